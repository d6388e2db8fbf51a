"""What each agent is told: a pure function of the written status and the agents' reports.

The barrier has no memory of its own: that it was passed in this attempt is seen in the reports, so an operator that has
just started answers a running gang with `run`, never with anything that would disturb it.
"""

from __future__ import annotations

from collections.abc import Sequence

from trireme_api.job import Phase, TrainingJobSpec, TrainingJobStatus
from trireme_api.layout import procs_per_node
from trireme_api.protocol import (
    Action,
    AgentState,
    Assignment,
    CheckpointRef,
    FailureCount,
    master_port,
    newest_whole,
)

from trireme_operator.decide.clock import seconds
from trireme_operator.decide.frozen import effective
from trireme_operator.decide.gang import HOLDING, Place
from trireme_operator.decide.views import Job


def barrier_passed(found: Sequence[Place], attempt: int) -> bool:
    """Ranks may start once every recorded pod of the gang holds the attempt; from the first that did, they all may."""
    if any(place.says(attempt, AgentState.STARTING, AgentState.RUNNING, AgentState.EXITED) for place in found):
        return True
    return bool(found) and all(
        place.slot.pod_uid is not None
        and place.pod is not None
        and bool(place.pod.ip)
        and not place.pod.leaving
        and place.says(attempt, AgentState.WAITING)
        for place in found
    )


def newest_in_memory(
    status: TrainingJobStatus, spec: TrainingJobSpec | None, found: Sequence[Place]
) -> CheckpointRef | None:
    """The newest set of shards that the pods at or past the barrier together hold, unless storage has a newer one.

    An agent repeats for the whole attempt what it held at the barrier, so the answer does not change afterwards.
    """
    if spec is None or spec.checkpoint is None or spec.checkpoint.memory is None:
        return None
    ranked = [place for place in found if not place.slot.spare]
    reports = [p.heard.report for p in ranked if p.heard is not None and p.heard.report.attempt == status.attempt]
    parts = (part for report in reports for part in report.memory)
    best = newest_whole(parts, len(ranked) * procs_per_node(spec))
    if best is None or (status.resume_from is not None and status.resume_from.step > best.step):
        return None
    return CheckpointRef(step=best.step, path=f"memory of attempt {best.attempt}")


class Crew:
    """The gang as its agents are told of it, from one reading of status and reports."""

    def __init__(self, job: Job, found: Sequence[Place]) -> None:
        self.job = job
        self._ranked = tuple(place for place in found if not place.slot.spare)
        self._spec = effective(job)
        self._by_uid = {place.pod.uid: place for place in found if place.pod is not None}
        self._node_ranks = {place.slot.index: rank for rank, place in enumerate(self._ranked)}
        self._passed = barrier_passed(self._ranked, job.status.attempt)
        first = self._ranked[0].pod if self._ranked else None
        self._master = first.ip if first is not None else ""
        self._memory = newest_in_memory(job.status, self._spec, found) if self._passed else None
        hang = job.status.hang
        self._hung = hang is not None and hang.attempt == job.status.attempt

    @property
    def key(self) -> object:
        """Changes exactly when any member's assignment does."""
        members = tuple((uid, place.slot.index, place.slot.pod_uid) for uid, place in self._by_uid.items())
        status, ranks = self.job.status, tuple(self._node_ranks.items())
        saves = status.sizing.target is not None
        known = status.phase, status.attempt, saves, self._passed, self._master, str(self._memory), self._hung
        return self.job.uid, self.job.deleting, known, ranks, members

    def assignment(self, pod_uid: str) -> Assignment:
        """What the pod with this UID is to do; a pod that is not of the crew is to stop."""
        status, spec = self.job.status, self._spec
        place = self._by_uid.get(pod_uid)
        if place is None or spec is None or self.job.deleting or status.phase not in HOLDING:
            return Assignment(attempt=status.attempt, action=Action.STOP)
        if status.phase == Phase.SUSPENDING:
            action = Action.SAVE_AND_STOP
        elif place.slot.spare:
            action = Action.HOLD
        elif status.sizing.target is not None:
            action = Action.SAVE_AND_HOLD
        else:
            action = Action.RUN if place.slot.pod_uid is not None and self._passed else Action.HOLD
        resume = status.resume_from
        return Assignment(
            attempt=status.attempt,
            action=action,
            node_rank=self._node_ranks.get(place.slot.index, len(self._ranked)),
            world_size=len(self._ranked),
            procs_per_node=procs_per_node(spec),
            master_address=self._master,
            master_port=master_port(status.attempt),
            spare=place.slot.spare,
            resume=CheckpointRef(step=resume.step, path=resume.path) if resume else None,
            memory=self._memory,
            failures=self._failures(),
            grace_seconds=float(spec.template.termination_grace_period_seconds),
            dump=True if self._hung else None,
        )

    def _failures(self) -> FailureCount | None:
        """For `checkpoint.everySteps: auto`; the same for the whole attempt."""
        status, spec = self.job.status, self._spec
        if spec is None or spec.checkpoint is None or spec.checkpoint.every_steps != "auto":
            return None
        admitted, began = seconds(status.admitted_at), seconds(status.attempt_started_at)
        ran = began - admitted - status.suspended_seconds if admitted is not None and began is not None else 0.0
        restarts = status.restarts
        return FailureCount(restarts.process + restarts.pod + restarts.gang, round(max(0.0, ran), 1))
