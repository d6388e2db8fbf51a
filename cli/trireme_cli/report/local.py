"""The story of a directory of `trireme run`: from what its sessions left and the step log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trireme_api import carbon

from trireme_cli import notes, sessions
from trireme_cli.report.sources import read_uri
from trireme_cli.report.steplog import Row, StepLog, seconds_by_state
from trireme_cli.report.story import (
    Bar,
    Energy,
    Entry,
    Story,
    environment,
    noted,
    ordered,
    peak_memory,
    progress_facts,
    training,
)
from trireme_cli.sessions import Session


def of_directory(directory: Path, intensity: carbon.Intensity | None, pue: float, now: float) -> Story:
    """Raises OSError where the directory is none of `trireme run`."""
    found = sessions.read(directory)
    plan = dict(found[-1].plan) if found else {}
    uri, log, missing = plan.get("checkpoint"), None, ""
    try:
        log = read_uri(str(uri)) if uri else None
        missing = "" if uri else "The run kept no checkpoints, beside which a step log would lie."
    except OSError as error:
        missing = f"No step log could be read at {uri}: {error.strerror or error}."
    return tell(directory, found, log, missing, notes.read_local(directory), intensity, pue, now)


def tell(
    directory: Path, found: Sequence[Session], log: StepLog | None, missing: str, written: list[notes.Note],
    intensity: carbon.Intensity | None, pue: float, now: float,
) -> Story:  # fmt: skip
    plan: Mapping[str, Any] = found[-1].plan if found else {}
    running = bool(found) and found[-1].ended is None
    message = str(found[-1].result.get("message", "")) if found else ""
    last = log.effective[-1] if log is not None and log.effective else None
    bars = attempts(log)
    totals: dict[str, float] = {}
    for bar in bars:
        for state, value in bar.seconds.items():
            totals[state] = totals.get(state, 0.0) + value
    elapsed = sum(totals.values())
    ratio = totals.get("step", 0.0) / elapsed if elapsed else None
    facts = progress_facts(last.step, _total(found), last.loss, last.tokens_per_second) if last is not None else []
    facts += [("goodput", f"{ratio:.1%}")] if ratio is not None else []
    facts.append(("restarts", str(sum(int(session.result.get("restarts", 0)) for session in found))))
    energy = spent(found, last, intensity, pue)
    facts += [("CO2e", carbon.mass(energy.grams))] if energy.grams is not None else []
    return Story(
        name=str(plan.get("name") or directory.name),
        where=f"trireme run with {plan.get('nproc', '?')} ranks on this machine",
        phase="Running" if running else "Ended",
        explanation=message or "no end was noted yet: it runs, or was killed with its supervisor",
        next=[],
        made_at=now,
        facts=facts,
        logbook=sorted([*decisions(found), *noted(written), *training(log)], key=lambda entry: entry.at),
        bars=bars,
        totals=ordered(totals),
        goodput=ratio,
        goodput_note="as far as the ranks' step log tells; time between attempts is not in it",
        steps=log,
        steps_missing=missing,
        energy=energy,
        configuration=plan.get("recipe") or {"command": plan.get("command", [])},
        environment=environment(log),
    )


def decisions(found: Sequence[Session]) -> list[Entry]:
    entries = []
    for session in found:
        ranks = session.plan.get("nproc", "?")
        entries.append(Entry(session.began, "decision", "started", f"attempt {session.attempt} on {ranks} ranks"))
        failures = session.result.get("failures", [])
        for number, failure in enumerate(failures):
            again = number < int(session.result.get("restarts", 0))
            text = f"attempt {failure['attempt']} at step {failure['step']}: {sessions.why(failure)}"
            at = failure.get("at") or session.ended or session.began
            entries.append(Entry(float(at), "warning", "restarted" if again else "given up", text))
        if session.ended is not None:
            entries.append(Entry(session.ended, "decision", "ended", str(session.result.get("message", ""))))
    return entries


def attempts(log: StepLog | None) -> list[Bar]:
    """Seconds of steps that a later attempt did again are lost, whatever the attempt itself took them for."""
    if log is None:
        return []
    bars = []
    for attempt in log.attempts:
        states = seconds_by_state(log, attempt)
        rows = log.of(attempt)
        counted = [c for row, c in zip(log.rows, log.counts, strict=True) if row.attempt == attempt]
        lost = counted.count(False)
        if rows and lost and "step" in states:
            part = states["step"] * lost / len(rows)
            states["step"], states["lost"] = states["step"] - part, states.get("lost", 0.0) + part
        times = [row.time for row in rows] + [event.time for event in log.events if event.attempt == attempt]
        begin = max(times) - sum(states.values())
        steps = f"{rows[0].step} to {rows[-1].step}" if rows else ""
        bars.append(Bar(str(attempt), begin, ordered(states), steps, lost, peak_memory(log, attempt)))
    return bars


def spent(found: Sequence[Session], last: Row | None, intensity: carbon.Intensity | None, pue: float) -> Energy:
    """Of all sessions that ended; the weakest source names the sum."""
    readings = [r for session in found for r in session.result.get("energy", {}).values()]
    known = [r for r in readings if r.get("joules") is not None]
    joules = sum(float(r["joules"]) for r in known) if known else None
    sources = ", ".join(sorted({str(r["source"]) for r in known})) or "missing"
    if joules is None or intensity is None:
        return Energy(joules, sources, pue=pue if joules is not None else None, tokens=last.tokens if last else None)
    grams = carbon.operational_grams(joules, pue, intensity.grams_per_kilowatt_hour)
    return Energy(
        joules, sources, grams, intensity.grams_per_kilowatt_hour, pue, intensity.source, last.tokens if last else None
    )


def _total(found: Sequence[Session]) -> int | None:
    for session in reversed(found):
        total = (session.result.get("progress") or {}).get("totalSteps")
        if total:
            return int(total)
    return None
