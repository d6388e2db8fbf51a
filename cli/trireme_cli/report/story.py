"""What a page tells of a run, without a word of HTML: pure functions of status, events, step log and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trireme_api.carbon import PUBLISHED, mass
from trireme_api.ledger import LEDGER_STATES, AttemptSeconds
from trireme_operator.decide.clock import duration, seconds

from trireme_cli.explanation import JobView, explain, next_steps
from trireme_cli.notes import Note
from trireme_cli.report import told
from trireme_cli.report.steplog import StepLog

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Entry:
    """A line of the logbook."""

    at: float
    kind: str
    """decision | warning | note | training"""
    title: str
    text: str


@dataclass(frozen=True)
class Bar:
    """One attempt."""

    attempt: str
    begin: float
    seconds: dict[str, float]
    """By state of the ledger."""
    steps: str = ""
    lost_steps: int = 0
    peak_memory: float | None = None
    """Bytes on the device of global rank 0, as far as told."""

    @property
    def length(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Energy:
    joules: float | None
    source: str
    grams: float | None = None
    grams_per_kilowatt_hour: float | None = None
    pue: float | None = None
    grid: str | None = None
    tokens: float | None = None
    more: Rows = field(default_factory=list)
    """Components, idle and embodied shares, attempts: what the cluster's accounting tells beyond a local run's."""

    @property
    def grams_per_million_tokens(self) -> float | None:
        return self.grams / self.tokens * 1e6 if self.grams is not None and self.tokens else None


@dataclass(frozen=True)
class Story:
    name: str
    where: str
    phase: str
    explanation: str
    next: list[str]
    made_at: float
    facts: Rows
    """Figures of the first look."""
    logbook: list[Entry]
    bars: list[Bar]
    totals: dict[str, float]
    """Seconds by state."""
    goodput: float | None
    goodput_note: str
    steps: StepLog | None
    steps_missing: str
    """Why there is no step log, where there is none."""
    energy: Energy
    details: list[tuple[str, Rows]] = field(default_factory=list)
    """Last failure, restarts, budgets, nodes: as `trireme explain` tells them."""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    environment: Rows = field(default_factory=list)


def of_job(
    obj: Mapping[str, Any], events: Iterable[Mapping[str, Any]], pods: Iterable[Mapping[str, Any]], notes: list[Note],
    log: StepLog | None, missing: str, now: float,
) -> Story:  # fmt: skip
    job = JobView.of(obj)
    status, goodput = job.status, job.status.goodput
    energy = status.energy
    joules = energy.joules if energy.source != "missing" else None
    tokens = status.progress.tokens if status.progress is not None else None
    carbon = status.carbon
    facts: Rows = []
    if (progress := status.progress) is not None:
        facts += progress_facts(progress.step, progress.total_steps, progress.loss, progress.tokens_per_second)
        facts += [("FLOP/s", f"{progress.tflops:.3g} T per device")] if progress.tflops is not None else []
        facts += [("MFU", f"{progress.mfu:.1%}")] if progress.mfu is not None else []
    if goodput is not None and goodput.ratio is not None:
        facts.append(("goodput", f"{goodput.ratio:.1%}"))
    facts.append(("restarts", str(status.restart_count)))
    facts += [("CO2e", carbon.summary)] if carbon.summary else []
    facts += [("left", progress.remaining)] if progress is not None and progress.remaining else []
    sections = [s for s in explain(job, now) if s.title and s.title not in ("next", "decisions")]
    spec = obj.get("spec") or {}
    return Story(
        name=job.name,
        where=f"namespace {job.namespace}",
        phase=job.phase + (f" ({status.reason})" if status.reason else ""),
        explanation=status.explanation,
        next=next_steps(job, now),
        made_at=now,
        facts=facts,
        logbook=sorted([*decisions(job, events), *noted(notes), *training(log)], key=lambda e: e.at),
        bars=attempts(job, log),
        totals=dict(goodput.seconds) if goodput is not None else {},
        goodput=goodput.ratio if goodput is not None else None,
        goodput_note="by the operator's clock",
        steps=log,
        steps_missing=missing,
        energy=Energy(
            joules, energy.source, carbon.grams, carbon.grams_per_kilowatt_hour, carbon.pue, carbon.source, tokens,
            accounted(job),
        ),
        details=[(section.title, section.rows) for section in sections],
        configuration=spec,
        environment=[*environment(log), *placed(pods)],
    )


def accounted(job: JobView) -> Rows:
    """Where the energy went, and the hardware's share of the carbon."""
    energy, carbon = job.status.energy, job.status.carbon
    rows = []
    if energy.by_component:
        rows.append(("by component", ", ".join(f"{k} {v:,.0f} J" for k, v in energy.by_component.items())))
    if energy.missing:
        rows.append(("not measured", f"{', '.join(energy.missing)}: all sums are lower bounds"))
    if energy.idle_joules:
        rows.append(("idle", f"{energy.idle_joules:,.0f} J while no rank ran"))
    for mode, grams in carbon.embodied_by_mode.items():
        rows.append((f"embodied, {mode}", f"{mass(grams.mid)} CO2e ({mass(grams.low)} to {mass(grams.high)})"))
    if carbon.total_grams is not None:
        rows.append(("operational and embodied", f"{mass(carbon.total_grams)} CO2e"))
    for row in ([energy.older] if energy.older is not None else []) + energy.attempts:
        grid = f", {mass(row.grams)} CO2e" if row.grams is not None else ""
        name = f"attempts to {row.attempt}" if row is energy.older else f"attempt {row.attempt}"
        rows.append((name, f"{sum(row.joules.values()):,.0f} J{grid}"))
    return rows


def progress_facts(step: int, total: int | None, loss: float | None, speed: float | None) -> Rows:
    facts = [("step", f"{step:,} of {total:,}" if total else f"{step:,}")]
    facts += [("loss", f"{loss:.4g}")] if loss is not None else []
    facts += [("tokens/s", f"{speed:,.0f}")] if speed is not None else []
    return facts


def decisions(job: JobView, events: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The status has them; events only add what is older than what it keeps, and still there."""
    found = [
        Entry(
            seconds(item.at) or 0.0, "warning" if item.warning else "decision", item.reason,
            item.message + (f" (×{item.count})" if item.count > 1 else ""),
        )
        for item in job.status.decisions
    ]  # fmt: skip
    known = {(entry.title, entry.text[:200]) for entry in found}
    for event in events:
        reason, message = str(event.get("reason", "")), str(event.get("message", ""))
        at = seconds(event.get("lastTimestamp") or event.get("eventTime"))
        if at is not None and (reason, message[:200]) not in known:
            kind = "warning" if event.get("type") == "Warning" else "decision"
            found.append(Entry(at, kind, reason, message))
    return found


def noted(notes: Iterable[Note]) -> list[Entry]:
    return [Entry(note.at, "note", f"note by {note.by}", note.text) for note in notes]


def training(log: StepLog | None) -> list[Entry]:
    found = []
    for event in log.events if log is not None else ():
        if (words := told.in_words(event)) is not None:
            title, text = words
            found.append(Entry(event.time, "training", f"{title}, attempt {event.attempt}", text))
    return found


def attempts(job: JobView, log: StepLog | None) -> list[Bar]:
    """Attempts follow one another without a gap from the job's start: the ledger has every second in one of them."""
    goodput, begin = job.status.goodput, seconds(job.status.start_time)
    if goodput is None or begin is None:
        return []
    bars = []
    rows: list[tuple[str, AttemptSeconds]] = [(str(row.attempt), row) for row in goodput.attempts]
    if goodput.older is not None:
        rows.insert(0, (f"1–{goodput.older.attempt}", goodput.older))
    for name, row in rows:
        steps = f"{row.from_step} to {row.step}" if row.step is not None else ""
        bars.append(Bar(name, begin, ordered(row.seconds), steps, row.lost_steps, peak_memory(log, row.attempt)))
        begin += bars[-1].length
    return bars


def ordered(spent: Mapping[str, float]) -> dict[str, float]:
    """In the order in which a job goes through the states; what this version does not know comes last."""
    known = [state for state in LEDGER_STATES if spent.get(state)]
    return {state: spent[state] for state in [*known, *(s for s in spent if s not in LEDGER_STATES and spent[s])]}


def peak_memory(log: StepLog | None, attempt: int) -> float | None:
    """The greatest that this attempt told of the device of global rank 0."""
    peaks = [
        float(value)
        for event in (log.events if log is not None else ())
        if event.attempt == attempt
        for key in ("peakMemoryBytes", "peakBytes")
        if isinstance(value := event.fields.get(key), int | float)
    ]
    return max(peaks, default=None)


def environment(log: StepLog | None) -> Rows:
    """What the newest attempt's ranks run on, as they tell."""
    newest = log.named("environment")[-1:] if log is not None else []
    return [(str(name), told.raw(value)) for event in newest for name, value in event.fields.items()]


def placed(pods: Iterable[Mapping[str, Any]]) -> Rows:
    found = []
    for pod in pods:
        spec = pod.get("spec") or {}
        image = next((c.get("image", "") for c in spec.get("containers") or [] if c.get("name") == "trainer"), "")
        phase = (pod.get("status") or {}).get("phase", "")
        where = spec.get("nodeName") or "no node yet"
        found.append((f"pod {pod['metadata']['name']}", f"{phase} on {where}, image {image}"))
    return found


def comparison(energy: Energy) -> list[tuple[str, str, str, str, str]]:
    """(run, MWh, g/kWh, t CO2e, this run is to it): published runs, largest first."""
    rows = []
    for run in sorted(PUBLISHED, key=lambda one: -one.tonnes):
        share = ""
        if energy.grams:
            times = run.tonnes * 1e6 / energy.grams
            share = f"1/{times:,.0f}" if times >= 1 else f"{1 / times:,.1f} ×"
        rows.append(
            (
                f"{run.name} ({run.scope}; {run.source})",
                f"{run.megawatt_hours:,.0f}" if run.megawatt_hours is not None else "not given",
                f"{run.grams_per_kilowatt_hour:g}" if run.grams_per_kilowatt_hour is not None else "not given",
                f"{run.tonnes:,.0f}",
                share or "not known",
            )
        )
    return rows


def span(bars: list[Bar]) -> str:
    return duration(sum(bar.length for bar in bars))
