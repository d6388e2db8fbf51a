"""What a pod's reports tell over time, by the operator's own clock: how long each rank has stood still.

Kept in memory only: an operator that has just started has seen nothing stand still yet, so it accuses nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from trireme_api.protocol import RankReport, Report

MAX_SIGHTINGS = 64


@dataclass(frozen=True)
class Sighting:
    """One report of a rank that had not moved since the one before."""

    at: float
    """By the operator's clock."""
    age: float
    """Seconds since its heartbeat changed, as the agent said then."""


@dataclass(frozen=True)
class Mark:
    """Where a rank stands, and every report since it came there."""

    step: int | None
    phase: str | None
    sightings: tuple[Sighting, ...]

    @property
    def last(self) -> Sighting:
        return self.sightings[-1]

    def stood_since(self, age: float) -> float | None:
        """When, by the operator's clock, the rank was first said to have stood still for `age` seconds or more."""
        return next((one.at for one in self.sightings if one.age >= age), None)


@dataclass(frozen=True)
class Trail:
    attempt: int = 0
    marks: dict[int, Mark] = field(default_factory=dict)
    """By local rank; only of ranks that write heartbeats."""
    stepped: bool = False
    """Whether a rank was seen to finish steps in this attempt, and not only the long first one."""


def follow(before: Trail, report: Report, now: float) -> Trail:
    """The trail with this report added."""
    known = before if before.attempt == report.attempt else Trail(report.attempt)
    marks: dict[int, Mark] = {}
    stepped = known.stepped or (report.phases is not None and report.phases.first_step is not None)
    for rank in report.ranks:
        if rank.heartbeat_age is None:
            continue
        mark = known.marks.get(rank.local_rank)
        seen = mark is not None and (rank.step or 0) > (mark.step or 0) > 0
        # Its agent looks far more often than it reports.
        stepped = stepped or seen or rank.step_seconds is not None
        marks[rank.local_rank] = _mark(mark, rank, Sighting(now, rank.heartbeat_age))
    return replace(known, marks=marks, stepped=stepped)


def _mark(before: Mark | None, rank: RankReport, sighting: Sighting) -> Mark:
    if before is None or (before.step, before.phase) != (rank.step, rank.phase) or sighting.age < before.last.age:
        return Mark(rank.step, rank.phase, (sighting,))
    seen = (*before.sightings, sighting)
    if len(seen) > MAX_SIGHTINGS:
        # Thinned where they are densest, never cut: how long it has been seen to stand still is what counts.
        least = min(range(1, len(seen) - 1), key=lambda i: seen[i + 1].at - seen[i - 1].at)
        seen = seen[:least] + seen[least + 1 :]
    return replace(before, sightings=seen)
