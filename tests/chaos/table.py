"""Trials to figures to a Markdown table and a JSON file's content. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from chaos.measure import PHASES

BEGIN, END = "<!-- {0}: begin, written by the chaos suite -->", "<!-- {0}: end -->"
TITLES = {
    "detect": "detect", "decide": "decide", "fence": "fence", "replace": "replace", "startup": "start-up",
    "rendezvous": "rendezvous", "load": "load", "firstStep": "first step",
}  # fmt: skip


def summary(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst over trials of everything that has a number. A phase counts the trials that have it."""
    if not trials:
        return {"n": 0}
    phases: dict[str, dict[str, float]] = {}
    for name in PHASES:
        values = [trial["phases"][name] for trial in trials if name in trial["phases"]]
        if values:
            phases[name] = spread(values)
    return {
        "n": len(trials),
        "total": spread([trial["total"] for trial in trials]),
        "phases": phases,
        "lostSteps": spread([trial["lostSteps"] for trial in trials]),
        "attempts": max(trial["attempts"] for trial in trials),
        "stepsDoneTwice": sum(trial["stepsDoneTwice"] for trial in trials),
        "largestDifference": max((trial["largestDifference"] or 0.0 for trial in trials), default=0.0),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "worst": round(max(values), 3)}


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per fault: `median / worst` seconds.

    results: fault → {what, kind, target, detectTarget, summary, verdict, …}, as the result file holds it.
    """
    head = ["fault", "n", *TITLES.values(), "total", "target", "lost steps", "load", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * len(head)) + "|"]
    for name, result in results.items():
        found = result["summary"]
        if not found["n"]:
            lines.append(f"| {name} | 0 |" + " |" * (len(head) - 3) + f" {result['verdict']} |")
            continue
        cells = [name, str(found["n"])]
        cells += [_pair(found["phases"].get(phase)) for phase in PHASES]
        pause = " (pause)" if result["kind"] == "pause" else ""
        cells += [_pair(found["total"]) + pause, _target(result), _pair(found["lostSteps"], 0)]
        cells += [f"{result['load']:g}", result["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pair(values: Mapping[str, float] | None, digits: int = 2) -> str:
    if values is None:
        return "–"
    return f"{values['median']:.{digits}f} / {values['worst']:.{digits}f}"


def _target(result: Mapping[str, Any]) -> str:
    parts = [f"{result['target']:g}"] if result.get("target") is not None else []
    if result.get("detectTarget") is not None:
        parts.append(f"detect {result['detectTarget']:g}")
    return ", ".join(parts) or "–"


def verdict(found: Mapping[str, Any], target: float | None, detect_target: float | None) -> str:
    """`met`, or which target was missed by how much. p95 of few trials is their worst."""
    missed = []
    if target is not None and found["total"]["worst"] > target:
        missed.append(f"total {found['total']['worst']:.1f} > {target:g}")
    detect = found["phases"].get("detect")
    if detect_target is not None and detect is not None and detect["worst"] > detect_target:
        missed.append(f"detect {detect['worst']:.1f} > {detect_target:g}")
    if missed:
        return "missed: " + ", ".join(missed)
    return "met" if target is not None or detect_target is not None else "measured"


def put(page: str, name: str, text: str) -> str:
    """`page` with what stands between the marks of `name` replaced. Raises ValueError where the marks are not there."""
    begin, end = BEGIN.format(name), END.format(name)
    before, mark, rest = page.partition(begin)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"the page has no marks for {name!r}: it needs {begin} and {end}")
    return f"{before}{begin}\n{text.strip()}\n{closing}{after}"
