"""The page: one file, no script, nothing loaded from anywhere; reads on paper and on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import yaml
from trireme_api.carbon import JOULES_PER_KILOWATT_HOUR, mass
from trireme_api.ledger import OUTSIDE_THE_RUN
from trireme_api.quantity import size
from trireme_operator.decide.clock import duration, stamp

from trireme_cli.report.charts import Figure, Line, Mark, figure, number, stacked, timeline
from trireme_cli.report.steplog import Row, StepLog
from trireme_cli.report.story import Bar, Energy, Entry, Rows, Story, comparison

SAFE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What pods wrote stands on this page: whatever it may contain, nothing runs and nothing is fetched."""
MEANING = {
    "step": "useful training", "lost": "done again later", "data-wait": "waiting for data", "init": "coming up",
    "compile": "first step", "checkpoint-blocked": "standing still for a save", "eval": "evaluation",
    "recovering": "recovering", "queued": "waiting for room", "pulling": "pulling images", "starting": "starting pods",
    "suspended": "suspended", "running": "running, not divided yet",
}  # fmt: skip
GAP = 30.0
"""Seconds without a step that a line of throughput does not bridge, or ten steps where those are longer."""


def page(story: Story) -> str:
    sections = [
        ("logbook", "Logbook", _logbook(story.logbook)),
        ("loss", "Loss", _loss(story)),
        ("throughput", "Throughput", _throughput(story)),
        ("time", "Where the time went", _time(story)),
        ("memory", "Memory", _memory(story.bars)),
        ("energy", "Energy and carbon", _energy(story.energy)),
        ("failures", "Failures and what is left", _details(story.details)),
        ("configuration", "Configuration", _configuration(story.configuration)),
        ("environment", "Environment", _pairs(story.environment) or _missing("not told yet")),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in shown)
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in story.facts)
    style = (files("trireme_cli") / "data" / "report.css").read_text(encoding="utf-8")
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{text}</section>' for name, title, text in shown)
    name = escape(story.name)
    after = f'<p class="soft">Next: {escape("; ".join(story.next))}.</p>' if story.next else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: logbook</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{SAFE}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><header><h1>{name}</h1>"
        f'<p class="soft">{escape(story.where)} · as of {_when(story.made_at)}</p>'
        f'<p><span class="phase {escape(story.phase.split(" ")[0])}">{escape(story.phase)}</span>: '
        f"{escape(story.explanation)}</p>{after}"
        f'<dl class="facts">{facts}</dl>'
        f'<nav aria-label="Sections">{links}</nav></header>'
        f"<main>{body}</main><footer>Made by trireme report. Times are UTC.</footer></body></html>\n"
    )


def _when(at: float) -> str:
    return stamp(at)[:19].replace("T", " ") if at else "unknown"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _logbook(entries: Sequence[Entry]) -> str:
    if not entries:
        return _missing("Nothing was decided yet.")
    rows = "".join(
        f'<tr class="{entry.kind}"><td class="t">{_when(entry.at)}</td><td><b>{escape(entry.title)}</b></td>'
        f"<td>{escape(entry.text)}</td></tr>"
        for entry in entries
    )
    head = "<thead><tr><th>when</th><th>what</th><th>how and why</th></tr></thead>"
    return f'<table class="log">{head}<tbody>{rows}</tbody></table>'


def _loss(story: Story) -> str:
    log = story.steps
    if log is None or not log.rows:
        return _missing(story.steps_missing or "No step yet.")
    effective = [row for row in log.effective if row.loss is not None]
    if not effective:
        return _missing("No step told a finite loss.")
    lines = [Line("counts", [(row.step, row.loss) for row in effective if row.loss is not None])]
    again = _superseded(log)
    if any(point is not None for point in again):
        lines.append(Line("done again by a later attempt", again, "faint"))
    last = effective[-1]
    lost = sum(not counts for counts in log.counts)
    summary = f"From {effective[0].loss:.4g} at step {effective[0].step} to {last.loss:.4g} at step {last.step}"
    starts = restarts(log)
    again_said = f"; {len(starts)} later attempt{'s' if len(starts) > 1 else ''}" + (
        f", {lost} of the steps shown were done again" if lost else ""
    )
    summary += f"{again_said}." if starts else "."
    marks = [
        Mark(row.step, f"attempt {row.attempt}", f"attempt {row.attempt} goes on at step {row.step}") for row in starts
    ]
    return figure(Figure("Loss", "optimiser step", "training loss", lines, marks, summary=summary))


def restarts(log: StepLog) -> list[Row]:
    """The first row of every attempt but the first."""
    first = {row.attempt: row for row in reversed(log.rows)}
    return [first[attempt] for attempt in sorted(first)][1:]


def _superseded(log: StepLog) -> list[tuple[float, float] | None]:
    found: list[tuple[float, float] | None] = []
    before: Row | None = None
    for row, counts in zip(log.rows, log.counts, strict=True):
        if counts or row.loss is None:
            before = None
            continue
        if before is None or before.attempt != row.attempt or before.step > row.step:
            found.append(None)
        found.append((row.step, row.loss))
        before = row
    return found


def _throughput(story: Story) -> str:
    log = story.steps
    if log is None or not log.rows:
        return ""
    rows = [row for row in log.rows if row.tokens_per_second is not None]
    if not rows:
        return _missing("No step told its speed yet.")
    begin = log.rows[0].time
    steps = sorted(b.time - a.time for a, b in zip(log.rows, log.rows[1:], strict=False))
    gap = max(GAP, 10 * steps[len(steps) // 2]) if steps else GAP

    def line(value: Callable[[Row], float | None]) -> list[tuple[float, float] | None]:
        points: list[tuple[float, float] | None] = []
        before: Row | None = None
        for row in rows:
            if before is not None and (row.attempt != before.attempt or row.time - before.time > gap):
                points.append(None)
            if (told := value(row)) is not None:
                points.append((row.time - begin, told))
            before = row
        return points

    marks = [
        Mark(r.time - begin, f"attempt {r.attempt}", f"attempt {r.attempt} at step {r.step}") for r in restarts(log)
    ]

    def plot(title: str, name: str, value: Callable[[Row], float | None], summary: str) -> str:
        lines = [Line(name, line(value))]
        return figure(Figure(title, "time since the first step", name, lines, marks, True, duration, summary))

    middle = sorted(row.tokens_per_second or 0.0 for row in rows)[len(rows) // 2]
    told = f"Median {number(middle)} tokens per second, all devices together. Gaps are time without steps."
    text = plot("Tokens per second", "tokens/s", lambda row: row.tokens_per_second, told)
    if any(row.tflops is not None for row in rows):
        best = max(row.tflops or 0.0 for row in rows)
        mfu = max((row.mfu for row in rows if row.mfu is not None), default=None)
        known = f", MFU {mfu:.1%}." if mfu is not None else "; MFU is not known, because the device's peak is not."
        text += plot("TFLOP/s per device", "model TFLOP/s", lambda row: row.tflops, f"At most {best:.3g}{known}")
    return text


def _time(story: Story) -> str:
    if not story.totals:
        return _missing("Not told yet.")
    elapsed = sum(value for state, value in story.totals.items() if state not in OUTSIDE_THE_RUN)
    whole = sum(story.totals.values())
    share = f"{story.goodput:.1%}" if story.goodput is not None else "not known"
    said = (
        f"Goodput {share}: useful steps in {duration(elapsed)} of elapsed time, queueing and suspension left out "
        f"(Llama 3's effective training time); {escape(story.goodput_note)}."
    )
    largest = dict(sorted(story.totals.items(), key=lambda item: -item[1]))
    rows = "".join(
        f'<tr><td><i class="swatch s-{escape(state)}"></i>{escape(state)}</td><td>{escape(MEANING.get(state, ""))}</td>'
        f'<td class="n">{value:,.1f}</td><td class="n">{value / whole:.1%}</td></tr>'
        for state, value in largest.items()
    )
    head = '<tr><th>state</th><th>what passes</th><th class="n">seconds</th><th class="n">share</th></tr>'
    text = f"<p>{said}</p>{stacked(largest, whole, 'all attempts')}"
    text += f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    if story.bars:
        text += "<h3>Attempts on the clock</h3>" + timeline([(b.attempt, b.begin, b.seconds) for b in story.bars])
        text += _missing("Within an attempt states stand in the order of a start, not as they came.")
        text += _attempts(story.bars)
    return text


def _attempts(bars: Sequence[Bar]) -> str:
    rows = "".join(
        f'<tr><td class="n">{escape(bar.attempt)}</td><td class="t">{_when(bar.begin)}</td>'
        f'<td class="n">{duration(bar.length)}</td><td class="n">{bar.seconds.get("step", 0.0):,.1f}</td>'
        f'<td class="n">{escape(bar.steps)}</td><td class="n">{bar.lost_steps or ""}</td></tr>'
        for bar in bars
    )
    names = ("attempt", "began", "took", "useful s", "steps", "steps lost")
    head = "".join(f"<th{'' if name == 'began' else ' class=n'}>{name}</th>" for name in names)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _memory(bars: Sequence[Bar]) -> str:
    told = [bar for bar in bars if bar.peak_memory is not None]
    if not told:
        return _missing("No attempt told its peak.")
    most = max(bar.peak_memory or 0.0 for bar in told)
    rows = "".join(
        f'<tr><td class="n">{escape(bar.attempt)}</td><td class="n">{size(bar.peak_memory or 0.0)}</td>'
        f'<td style="width:60%">{stacked({"init": bar.peak_memory or 0.0}, most, "peak")}</td></tr>'
        for bar in told
    )
    text = "<p>Peak of global rank 0: allocated on its GPU, or resident where it computes on CPUs.</p>"
    head = "<th class=n>attempt</th><th class=n>peak</th><th></th>"
    return f"{text}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _energy(energy: Energy) -> str:
    if energy.joules is None:
        text = _missing("No energy was measured or declared; nothing is assumed in its place.")
    else:
        kwh = energy.joules / JOULES_PER_KILOWATT_HOUR
        rows: Rows = [("energy of the devices", f"{_kwh(kwh)} ({energy.joules:,.0f} J), source {energy.source}")]
        if energy.grams_per_kilowatt_hour is not None:
            rows.append(("grid", f"{energy.grams_per_kilowatt_hour:g} g CO2e/kWh: {energy.grid or 'source not told'}"))
        if energy.pue is not None:
            rows.append(("PUE", f"{energy.pue:g}"))
        if energy.grams is not None:
            rows.append(("operational carbon", f"{mass(energy.grams)} CO2e = energy × PUE × grid"))
        else:
            rows.append(("operational carbon", "not known: no grid zone was given"))
        if (each := energy.grams_per_million_tokens) is not None:
            rows.append(("per million tokens", f"{mass(each)} CO2e"))
        text = _pairs([*rows, *energy.more])
    head = '<th>published run</th><th class="n">MWh</th><th class="n">g/kWh</th><th class="n">t CO2e</th>'
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{a}</td><td class="n">{b}</td><td class="n">{c}</td>'
        f'<td class="n">{d}</td></tr>'
        for name, a, b, c, d in comparison(energy)
    )
    head += '<th class="n">this run is</th>'
    return text + (
        "<h3>Beside known runs</h3><p class=soft>As printed; scopes differ, and none is of this model: an order of "
        'magnitude, no ranking.</p><div class="wide"><table class="runs">'
        f"<thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>"
    )


def _kwh(kwh: float) -> str:
    if kwh >= 1000:
        return f"{kwh / 1000:,.4g} MWh"
    return f"{kwh:,.4g} kWh" if kwh >= 1 else f"{kwh * 1000:,.4g} Wh"


def _details(details: Iterable[tuple[str, Rows]]) -> str:
    return "".join(f"<h3>{escape(title)}</h3>{_pairs(rows)}" for title, rows in details)


def _pairs(rows: Rows) -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="pairs"><tbody>{cells}</tbody></table>'


def _configuration(configuration: Mapping[str, Any]) -> str:
    if not configuration:
        return ""
    plain = json.loads(json.dumps(configuration, default=str))
    return f"<pre>{escape(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))}</pre>"
