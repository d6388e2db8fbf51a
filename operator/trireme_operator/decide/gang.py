"""Which pods should exist: a pure function of status, so a crash between any two writes is mended by the next look."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trireme_api.job import Phase, Slot, TrainingJobSpec, pod_name
from trireme_api.protocol import AgentState

from trireme_operator.decide.actions import Act, CreatePod, DeletePod
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.views import Heard, Job, Node, Observed, Pod

HOLDING = frozenset({Phase.STARTING, Phase.RUNNING, Phase.RECOVERING, Phase.SUSPENDING})
"""Phases in which the gang holds its nodes."""
FAREWELL_SECONDS = 30.0
GANG_GRACE_SECONDS = 10
"""For pods of a broken gang: their ranks cannot save any more, they only have to end."""


@dataclass(frozen=True)
class Place:
    """One slot of the gang with what is known of it."""

    slot: Slot
    pod: Pod | None
    heard: Heard | None
    node: Node | None
    node_gone: bool = False
    """The pod is bound to a node that no longer exists."""

    def says(self, attempt: int, *states: AgentState) -> bool:
        """Its agent holds this attempt and is in one of these states."""
        return self.heard is not None and self.heard.report.attempt == attempt and self.heard.report.state in states

    def done(self, attempt: int) -> bool:
        """All its ranks ended well in this attempt."""
        if self.pod is not None and self.pod.phase == "Succeeded":
            return True
        if not self.says(attempt, AgentState.EXITED):
            return False
        assert self.heard is not None
        report = self.heard.report
        return report.failure is None and bool(report.ranks) and all(rank.exit == 0 for rank in report.ranks)

    def node_lost(self, now: float, silent_seconds: float) -> bool:
        """The node is gone, or suspect while the agent has fallen silent too: a dead kubelet alone costs nothing, nor
        does one missed poll."""
        return self.node_gone or now >= self.lost_at(silent_seconds)

    def lost_at(self, silent_seconds: float) -> float:
        """When the pod counts as lost with its node if nothing more is heard; infinity while the node is well."""
        if self.node is None or not self.node.suspect:
            return math.inf
        if self.heard is None:
            # A pod just made on it has had no time to say anything.
            made = self.pod.created_at if self.pod is not None else 0.0
            return max(self.node.not_ready_since or 0.0, made) + silent_seconds
        return self.heard.at + self.heard.wait + silent_seconds


def places(job: Job, seen: Observed) -> list[Place]:
    """All slots; those with ranks in the order of their node ranks, then the spares."""
    by_name = {pod.name: pod for pod in seen.pods}
    found = []
    for slot in job.status.slots:
        pod = by_name.get(pod_name(job.name, slot))
        if pod is not None and slot.pod_uid not in (None, pod.uid):
            pod = None  # made by someone else under our pod's name; the recorded one is gone
        node = seen.nodes.get(pod.node) if seen.nodes is not None and pod is not None and pod.node else None
        gone = seen.nodes is not None and pod is not None and bool(pod.node) and node is None
        found.append(Place(slot, pod, seen.heard.get(pod.uid) if pod else None, node, gone))
    return found


def fresh_slots(count: int, attempt: int, spares: int = 0) -> list[Slot]:
    return [Slot(index=index, incarnation=attempt, spare=index >= count) for index in range(count + spares)]


def alive(place: Place, now: float, silent_seconds: float) -> bool:
    """Whether the pod can run another attempt as it is."""
    pod = place.pod
    return pod is not None and not pod.over and not pod.leaving and not place.node_lost(now, silent_seconds)


def fenced(pod: Pod, seen: Observed, now: float) -> bool:
    """A pod that no longer holds its slot: ended, on a lost node, or past its grace. What it may still do as a zombie
    is stopped by its attempt number (rendezvous port, checkpoint fence), not by waiting for it."""
    if pod.over:
        return True
    if pod.deletion_at is not None and now > pod.deletion_at + seen.limits.overdue_seconds:
        return True
    if seen.nodes is None or not pod.node:
        return False
    node = seen.nodes.get(pod.node)
    return Place(Slot(index=0, incarnation=0), pod, seen.heard.get(pod.uid), node, node is None).node_lost(
        now, seen.limits.silent_seconds
    )


def changes(job: Job, spec: TrainingJobSpec | None, seen: Observed, now: float) -> tuple[Act, ...]:
    """Deletions, then creations, that make the pods what the written status says."""
    status = job.status
    if status.phase in (Phase.SUCCEEDED, Phase.FAILED):
        return tuple(_after_the_end(job, spec, seen, now))
    wanted = {pod_name(job.name, slot): slot for slot in status.slots} if status.phase in HOLDING else {}
    acts: list[Act] = []
    for pod in seen.pods:
        slot = wanted.get(pod.name)
        replaced = slot is not None and slot.pod_uid not in (None, pod.uid)
        left = pod.node in status.draining and status.phase != Phase.SUSPENDING and not pod.over
        if slot is not None and not replaced and left and not pod.leaving:
            # With its own grace: its ranks, and so those of the whole gang, save first.
            acts.append(DeletePod(pod.name, pod.uid))
        if (slot is None or replaced) and not pod.leaving and pod.incarnation <= status.attempt:
            # A newer incarnation than status knows means that this view of the status is old: leave it alone.
            acts.append(DeletePod(pod.name, pod.uid, None if status.phase == Phase.SUSPENDED else GANG_GRACE_SECONDS))
    if status.phase in HOLDING and status.phase != Phase.SUSPENDING:
        acts += [CreatePod(slot) for slot in missing(job, seen) if not occupied(slot, job, seen, now)]
    return tuple(acts)


def missing(job: Job, seen: Observed) -> list[Slot]:
    """Slots whose pod is not there and was never recorded."""
    names = {pod.name for pod in seen.pods}
    return [slot for slot in job.status.slots if slot.pod_uid is None and pod_name(job.name, slot) not in names]


def occupied(slot: Slot, job: Job, seen: Observed, now: float) -> bool:
    """An older pod of this slot may still run: two pods of one slot must never be alive together."""
    return any(
        pod.slot == slot.index and pod.name != pod_name(job.name, slot) and not fenced(pod, seen, now)
        for pod in seen.pods
    )


def _after_the_end(job: Job, spec: TrainingJobSpec | None, seen: Observed, now: float) -> list[Act]:
    policy = spec.run_policy.clean_pod_policy if spec is not None else "Running"
    current = {pod_name(job.name, slot) for slot in job.status.slots if not slot.spare}
    leave_it = job.status.phase == Phase.SUCCEEDED and now < leaves_by(job)
    acts: list[Act] = []
    for pod in seen.pods:
        keep = policy == "None" or (policy == "Running" and (pod.over or leave_it))
        if not pod.leaving and not (pod.name in current and keep):
            acts.append(DeletePod(pod.name, pod.uid))
    return acts


def leaves_by(job: Job) -> float:
    """Until then the pods of a job that ended well may end by themselves, as their agents are told to: a pod that is
    Succeeded, with its logs, is worth more than one that was deleted."""
    return (seconds(job.status.completion_time) or 0.0) + FAREWELL_SECONDS
