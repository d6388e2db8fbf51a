"""From what a job left behind (its step log, its status) to one row of the table. Pure: no I/O, no clock."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

from demo.curve import Curve, Row

PHASES = ("detect", "decide", "fence", "replace", "startup", "rendezvous", "load", "firstStep")
"""In order of time; of one recovery they add up to its total."""
EXACT = 1e-5
"""Two attempts at one step must have the same loss to this, in nats."""


class Broken(Exception):
    """A promise was not kept: training did not continue, or not exactly."""


@dataclass(frozen=True)
class Trial:
    """One fault and what came of it. Seconds."""

    total: float
    """From the fault to the end of the first new step; where nothing restarted: the longest time without a step."""
    phases: dict[str, float] = field(default_factory=dict)
    lost_steps: int = 0
    """Steps that had to be done again."""
    attempts: int = 0
    """How many new attempts it took."""
    twice: int = 0
    """Steps done by both attempts, all with equal losses."""
    largest_difference: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "total": round(self.total, 3),
            "phases": {name: round(value, 3) for name, value in self.phases.items()},
            "lostSteps": self.lost_steps,
            "attempts": self.attempts,
            "stepsDoneTwice": self.twice,
            "largestDifference": self.largest_difference,
        }
        return {**found, **({"facts": self.facts} if self.facts else {})}


def seconds(text: str | None) -> float | None:
    """Unix seconds of an RFC 3339 time; None for none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None


def events(lines: Iterable[str], name: str, attempt: int | None = None) -> list[dict[str, Any]]:
    """Events of a step log, in the order written; a line torn by a kill is left out."""
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("event") == name and attempt in (None, row.get("attempt")):
            found.append(row)
    return found


def first_new(curve: Curve, attempt: int) -> Row | None:
    """The first step of any attempt after `attempt`."""
    return next((row for row in curve.rows if row.attempt > attempt), None)


def lost_steps(curve: Curve, attempt: int, first: Row) -> int:
    """Steps that attempts up to `attempt` had done beyond where the new one began."""
    before = max((row.step for row in curve.rows if row.attempt <= attempt), default=0)
    return max(0, before - (first.step - 1))


def pause(curve: Curve, since: float, until: float) -> float:
    """The longest time without a step that ended or lasted within [since, until]."""
    times = sorted(row.time for row in curve.rows)
    if not times or times[0] > until:
        raise Broken("no step was done at all")
    inside = [t for t in times if since <= t <= until]
    begin = max((t for t in times if t < since), default=since)
    edges = [begin, *inside, until]
    return max(later - earlier for earlier, later in pairwise(edges))


def step_seconds(curve: Curve, last: int = 50) -> float:
    """Median time between the newest steps of one attempt."""
    rows = curve.of(curve.attempts()[-1])[-last - 1 :]
    gaps = [later.time - earlier.time for earlier, later in pairwise(rows)]
    if not gaps:
        raise Broken("fewer than two steps: no step time")
    return statistics.median(gaps)


def recovery_phases(
    injected_at: float, attempt: int, status: Mapping[str, Any], started: Mapping[str, Any], first: Row
) -> dict[str, float]:
    """Where the seconds of one recovery went. All clocks are one machine's.

    injected_at   Unix seconds of the fault
    attempt       the one it broke
    status        the TrainingJob's, after the first new step: lastFailure (detect, decide, fence), attemptStartedAt
    started       the step log's event of that name, of the new attempt: how long rank 0 took from its process start to
                  each milestone
    first         the first row of the new attempt

    detect, decide, fence are the operator's and agents' own figures; startup to firstStep are rank 0's. `replace`
    is what lies between: pods made and placed, the barrier, processes started. So the parts add up to the total.
    """
    failure = status.get("lastFailure") or {}
    decided_at = seconds(status.get("attemptStartedAt"))
    if decided_at is None or not attempt <= int(failure.get("attempt") or 0) < first.attempt:
        return {}
    own = {name: float(started.get(name, 0.0)) for name in ("imported", "rendezvous", "initialised", "loaded")}
    told = failure.get("phases") or {}
    until_decided = max(0.0, decided_at - injected_at)
    decide = min(float(told.get("decide") or 0.0), until_decided)
    ranks_started_at = first.time - sum(own.values()) - float(started.get("first_step", 0.0))
    between = max(0.0, ranks_started_at - decided_at)
    fence = min(float(told.get("fence") or 0.0), between)
    parts = {
        "detect": until_decided - decide,
        "decide": decide,
        "fence": fence,
        "replace": between - fence,
        "startup": own["imported"],
        "rendezvous": own["rendezvous"],
        "load": own["initialised"] + own["loaded"],
    }
    parts["firstStep"] = max(0.0, first.time - injected_at - sum(parts.values()))
    return parts


def recovered(
    injected_at: float, attempt: int, lines: list[str], curve: Curve, status: Mapping[str, Any], **facts: Any
) -> Trial:
    """A fault that made the gang start again. Raises Broken where it did not, or not exactly."""
    first = first_new(curve, attempt)
    if first is None:
        raise Broken(f"no step after attempt {attempt}")
    began = events(lines, "started", first.attempt)
    phases = recovery_phases(injected_at, attempt, status, began[0], first) if began else {}
    twice, difference = exact(curve, since=attempt)
    return Trial(
        total=first.time - injected_at,
        phases=phases,
        lost_steps=lost_steps(curve, attempt, first),
        attempts=first.attempt - attempt,
        twice=twice,
        largest_difference=difference,
        facts=facts,
    )


def exact(curve: Curve, since: int = 0) -> tuple[int, float | None]:
    """(steps done by more than one attempt from `since` on, their largest difference). Raises Broken where it is too
    large or where a step is missing."""
    late = Curve([row for row in curve.rows if row.attempt >= since])
    missing = curve.missing()
    if missing:
        raise Broken(f"steps {missing[:5]} were never done")
    for earlier, later in pairwise(curve.rows):
        if later.attempt < earlier.attempt:
            raise Broken(f"attempt {later.attempt} wrote step {later.step} after attempt {earlier.attempt} had begun")
    odd = [row.step for row in late.rows if not math.isfinite(row.loss)]
    if odd:
        raise Broken(f"the loss of step {odd[0]} is no number")
    difference = late.largest_difference()
    if difference is not None and not difference <= EXACT:
        raise Broken(f"steps done twice differ by {difference:g}, more than {EXACT:g}")
    return len(late.repeated()), difference


def as_undisturbed(curve: Curve, undisturbed: Mapping[int, float]) -> int:
    """How many steps have the loss of a run that nothing disturbed. Raises Broken where one has another."""
    mine = curve.newest()
    common = sorted(set(mine) & set(undisturbed))
    for step in common:
        if not abs(mine[step] - undisturbed[step]) <= EXACT:
            raise Broken(f"loss of step {step} is {mine[step]}, of the undisturbed run {undisturbed[step]}")
    return len(common)


def duplicates(pods: Iterable[Mapping[str, Any]]) -> list[str]:
    """Slots filled by more than one pod that is neither ended nor leaving, as `slot N: names`."""
    slots: dict[str, list[str]] = {}
    for pod in pods:
        metadata = pod["metadata"]
        if metadata.get("deletionTimestamp") or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            continue
        slots.setdefault(str(metadata["labels"].get("trireme.dev/slot")), []).append(metadata["name"])
    return [f"slot {slot}: {', '.join(sorted(names))}" for slot, names in sorted(slots.items()) if len(names) > 1]
