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


def assignment(job: Job, found: Sequence[Place], pod_uid: str) -> Assignment:
    """The assignment of the pod with this UID, as far as the written status and what was heard so far tell."""
    status, spec = job.status, effective(job)
    place = next((p for p in found if p.pod is not None and p.pod.uid == pod_uid), None)
    if place is None or spec is None or job.deleting or status.phase not in HOLDING:
        return Assignment(attempt=status.attempt, action=Action.STOP)
    if status.phase == Phase.SUSPENDING:
        action = Action.SAVE_AND_STOP
    elif place.slot.pod_uid is not None and barrier_passed(found, status.attempt):
        action = Action.RUN
    else:
        action = Action.HOLD
    first = found[0].pod
    resume = status.resume_from
    return Assignment(
        attempt=status.attempt,
        action=action,
        node_rank=place.slot.index,
        world_size=len(found),
        procs_per_node=procs_per_node(spec),
        master_address=first.ip if first is not None else "",
        master_port=master_port(status.attempt),
        resume=CheckpointRef(step=resume.step, path=resume.path) if resume else None,
        grace_seconds=float(spec.template.termination_grace_period_seconds),
    )
