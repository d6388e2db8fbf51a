"""The working copy of one reconcile call: the status being written, the events, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass, field

from trireme_api.decisions import noted
from trireme_api.job import Phase, TrainingJobSpec, TrainingJobStatus

from trireme_operator.decide import conditions
from trireme_operator.decide.actions import Note
from trireme_operator.decide.clock import stamp
from trireme_operator.decide.gang import Place, alive, places
from trireme_operator.decide.grid import Known, known
from trireme_operator.decide.views import Job, Observed


@dataclass
class Draft:
    job: Job
    spec: TrainingJobSpec
    """The effective one."""
    seen: Observed
    now: float
    status: TrainingJobStatus
    found: list[Place] = field(default_factory=list)
    """Places with ranks, by node rank."""
    spares: list[Place] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    wake: float | None = None
    grid: Known = field(init=False)
    """The intensity it is reckoned with, and the one its schedule goes by."""

    def __post_init__(self) -> None:
        self.grid = known(self.spec.carbon_policy, self.seen.grid, self.now)
        seats = places(self.job, self.seen)
        self.found = [place for place in seats if not place.slot.spare]
        self.spares = [place for place in seats if place.slot.spare]

    def place(self, index: int) -> Place:
        """The one of this slot number among those with ranks."""
        return next(place for place in self.found if place.slot.index == index)

    def note(self, reason: str, message: str, warning: bool = False) -> None:
        """A decision: an event, and a line in the logbook of the status."""
        self.notes.append(Note(reason, message, warning))
        self.status.decisions = noted(self.status.decisions, stamp(self.now), reason, message, warning)

    def wake_at(self, when: float) -> None:
        """Look again at this time though nothing happens."""
        self.wake = when if self.wake is None else min(self.wake, when)

    def enter(self, phase: Phase, reason: str, message: str) -> None:
        conditions.enter(self.status, phase, reason, message, self.now, self.job.generation)

    def alive(self, place: Place) -> bool:
        return alive(place, self.now, self.seen.limits.silent_seconds)
