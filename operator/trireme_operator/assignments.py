"""What each agent is told: a pure function of the written status and the agents' reports.

The barrier has no memory of its own: that it was passed in this attempt is seen in the reports, so an operator that has
just started answers a running gang with `run`, never with anything that would disturb it.
"""

from __future__ import annotations

from collections.abc import Sequence

from trireme_api.job import Phase
from trireme_api.layout import procs_per_node
from trireme_api.protocol import Action, AgentState, Assignment, CheckpointRef, master_port

from trireme_operator.frozen import effective
from trireme_operator.gang import HOLDING, Place
from trireme_operator.views import Job


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


class Crew:
    """The gang as its agents are told of it, from one reading of status and reports."""

    def __init__(self, job: Job, found: Sequence[Place]) -> None:
        self.job = job
        self._found = tuple(found)
        self._spec = effective(job)
        self._by_uid = {place.pod.uid: place for place in found if place.pod is not None}
        self._passed = barrier_passed(found, job.status.attempt)
        first = found[0].pod if found else None
        self._master = first.ip if first is not None else ""

    @property
    def key(self) -> object:
        """Changes exactly when any member's assignment does."""
        members = tuple((uid, place.slot.index, place.slot.pod_uid) for uid, place in self._by_uid.items())
        status = self.job.status
        return self.job.uid, self.job.deleting, status.phase, status.attempt, self._passed, self._master, members

    def assignment(self, pod_uid: str) -> Assignment:
        """What the pod with this UID is to do; a pod that is not of the crew is to stop."""
        status, spec = self.job.status, self._spec
        place = self._by_uid.get(pod_uid)
        if place is None or spec is None or self.job.deleting or status.phase not in HOLDING:
            return Assignment(attempt=status.attempt, action=Action.STOP)
        if status.phase == Phase.SUSPENDING:
            action = Action.SAVE_AND_STOP
        else:
            action = Action.RUN if place.slot.pod_uid is not None and self._passed else Action.HOLD
        resume = status.resume_from
        return Assignment(
            attempt=status.attempt,
            action=action,
            node_rank=place.slot.index,
            world_size=len(self._found),
            procs_per_node=procs_per_node(spec),
            master_address=self._master,
            master_port=master_port(status.attempt),
            resume=CheckpointRef(step=resume.step, path=resume.path) if resume else None,
            grace_seconds=float(spec.template.termination_grace_period_seconds),
        )
