"""Which figures must agree, and whether they do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demo.curve import Curve

ENERGY = 0.01
"""By how much the energy told may differ from what the witness has integrated."""
UNTOLD_SECONDS = 8.0
"""Of a pod that is killed with no grace: since its last report. Counts by its length in a run of few minutes."""
OWN_CLOCK = 2.0
"""Seconds: the witness sees a change of status by polling it, and status is written when something moves."""
WRITTEN = 1e-3
"""Of printed figures, which are rounded to three decimals or more."""


@dataclass(frozen=True)
class Check:
    """One figure as several places tell it."""

    what: str
    told: Mapping[str, float | None]
    relative: float = 0.0
    absolute: float = 0.0
    """What the places may differ by: this, and `relative` of the largest."""

    @property
    def difference(self) -> float | None:
        """Between the largest and the smallest; None where a place tells nothing."""
        values = [value for value in self.told.values() if value is not None]
        return max(values) - min(values) if len(values) == len(self.told) else None

    @property
    def holds(self) -> bool:
        if self.difference is None or len(self.told) < 2:
            return False
        largest = max(abs(value) for value in self.told.values() if value is not None)
        return self.difference <= self.absolute + self.relative * largest

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "told": dict(self.told), "difference": self.difference, "holds": self.holds}


@dataclass(frozen=True)
class Books:
    """What each place told when the job had ended."""

    status: Mapping[str, Any]
    top: Mapping[str, Any]
    explain: Mapping[str, Any]
    report: Mapping[str, Any]
    prometheus: Mapping[str, Mapping[str, float]]
    """By name without `trireme_job_`, then by the label that tells its series apart."""


def sums(status: Mapping[str, Any], began: float, ended: float, attempts: Mapping[int, float]) -> list[Check]:
    """The ledger: buckets sum to wall time. By the clock of whoever watched: when the job was seen to begin and to end,
    and how long the ledger's newest row was that of each attempt. Unix seconds."""
    goodput = status["goodput"]
    rows = {row["attempt"]: sum(row["seconds"].values()) for row in goodput["attempts"]}
    whole = sum(goodput["seconds"].values())
    found = [
        Check("seconds in all", {"states": whole, "attempts": sum(rows.values())}, absolute=WRITTEN),
        Check("seconds of the whole job", {"ledger": whole, "watched": ended - began}, absolute=OWN_CLOCK),
    ]  # fmt: skip
    found += [
        Check(f"seconds of attempt {number}", {"ledger": seconds, "watched": attempts.get(number)}, absolute=OWN_CLOCK)
        for number, seconds in rows.items()
    ]
    return found


def training(books: Books, curve: Curve, tokens_a_step: int, failures: int) -> list[Check]:
    """Steps, tokens, failures: every place, and the step log."""
    status, prometheus, progress = books.status, books.prometheus, books.status["progress"]
    again = sum(len(losses) - 1 for losses in curve.repeated().values())
    restarts = status["restarts"]
    return [
        Check("steps", {
            "status": progress["step"], "prometheus": only(prometheus["step"]), "top": books.top["progress"]["step"],
            "explain": books.explain["progress"]["step"], "step log": curve.last_step(),
        }),
        Check("tokens", {
            "status": progress["tokens"], "prometheus": only(prometheus["tokens"]),
            "top": books.top["progress"]["tokens"], "explain": books.explain["progress"]["tokens"],
            "report": books.report["energy"]["tokens"], "step log": curve.last_step() * tokens_a_step,
        }),
        Check("steps done again", {
            "status": status["goodput"]["lostSteps"], "prometheus": only(prometheus["lost_steps"]),
            "report": sum(bar["lost_steps"] for bar in books.report["bars"]), "step log": again,
        }),
        Check("failures", {
            "status": sum(restarts["byCause"].values()), "prometheus": sum(prometheus["failures_total"].values()),
            "explain": sum(books.explain["restarts"]["byCause"].values()), "inflicted": failures,
        }),
        Check("restarts", {
            "status": status["restartCount"], "prometheus": sum(prometheus["restarts_total"].values()),
            "top": books.top["restartCount"], "report": float(dict(books.report["facts"])["restarts"]),
            "inflicted": failures,
        }),
        Check("goodput", {
            "status": status["goodput"]["ratio"], "prometheus": only(prometheus["goodput_ratio"]),
            "top": books.top["goodput"], "report": books.report["goodput"],
        }),
        *(Check(f"seconds in {state}", {
            "status": status["goodput"]["seconds"].get(state, 0.0), "prometheus": seconds,
            "report": books.report["totals"].get(state, 0.0),
        }, absolute=WRITTEN) for state, seconds in prometheus["seconds_total"].items()),
    ]  # fmt: skip


def footprint(
    books: Books, witness: Mapping[str, float], agents: float, minutes: float, pue: float, grid: float
) -> list[Check]:
    """Energy and carbon. `witness`: joules by component; `agents`: what the pods' own counters last told Prometheus;
    `grid`: g/kWh of the zone, read from the table by other code."""
    energy, carbon, prometheus = books.status["energy"], books.status["carbon"], books.prometheus
    untold = 0.0 if minutes >= 15 else UNTOLD_SECONDS / (60 * minutes)
    joules = energy["joules"]
    grams = joules / 3.6e6 * pue * grid
    return [
        Check("joules", {
            "status": joules, "prometheus": only(prometheus["energy_joules"]),
            "report": books.report["energy"]["joules"],
            "attempts": sum(sum(row["joules"].values()) for row in energy["attempts"]),
        }, absolute=0.5),
        *(Check(f"joules of {name}", {"status": energy["byComponent"].get(name), "witness": seen}, ENERGY + untold)
          for name, seen in sorted(witness.items())),
        Check("joules of all", {"status": joules, "witness": sum(witness.values())}, ENERGY + untold),
        # A pod's last words are never scraped: each counter is behind by up to an interval.
        Check("joules of the pods' own counters", {"status": joules, "agents": agents}, 0.02 + untold),
        Check("operational grams", {
            "status": carbon["grams"], "prometheus": prometheus["carbon_grams"].get("operational"),
            "top": books.top["carbonGrams"], "report": books.report["energy"]["grams"], "by hand": grams,
        }, WRITTEN, 1e-4),
        Check("embodied grams", {
            "status": carbon["embodied"]["mid"], "prometheus": prometheus["carbon_grams"].get("embodied"),
        }),
        Check("grams per million tokens", {
            "status": carbon["gramsPerMillionTokens"],
            "prometheus": only(prometheus["carbon_grams_per_million_tokens"]),
            "by hand": (carbon["grams"] + carbon["embodiedByMode"]["calendar"]["mid"])
            / books.status["progress"]["tokens"] * 1e6,
        }, WRITTEN, 1e-4),
    ]  # fmt: skip


def only(series: Mapping[str, float]) -> float | None:
    """The value of the one series; None where there is none, or more than one."""
    return next(iter(series.values())) if len(series) == 1 else None


def table(checks: list[Check]) -> str:
    """For a person: what agrees, and what does not."""
    lines = []
    for check in checks:
        values = "  ".join(f"{place} {_number(value)}" for place, value in check.told.items())
        lines.append(f"  {'agree' if check.holds else 'DIFFER'}  {check.what}: {values}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:,.4f}".rstrip("0").rstrip(".")
