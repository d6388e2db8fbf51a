"""What the operator knows of the world, as plain immutable values: the input of every pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trireme_api.job import API_VERSION, KIND, TrainingJobSpec, TrainingJobStatus
from trireme_api.protocol import AgentState, Report
from trireme_api.quantity import parse_quantity
from trireme_api.schema import InvalidSpec
from trireme_api.validation import Checked, check_job

from trireme_operator.decide.clock import seconds
from trireme_operator.decide.grid import Grid
from trireme_operator.decide.trail import Trail

MANAGED = "trireme.dev/managed"
JOB_LABEL = "trireme.dev/job"
JOB_UID_LABEL = "trireme.dev/job-uid"
SLOT_LABEL = "trireme.dev/slot"
INCARNATION_LABEL = "trireme.dev/incarnation"

Key = tuple[str, str]
"""(namespace, name) of a TrainingJob."""


@dataclass(frozen=True)
class Job:
    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created_at: float
    deleting: bool
    spec: TrainingJobSpec | None
    """None where `problems` says why."""
    problems: tuple[InvalidSpec, ...]
    status: TrainingJobStatus
    raw_status: Mapping[str, Any]

    @property
    def key(self) -> Key:
        return self.namespace, self.name

    @cached_property
    def admitted(self) -> TrainingJobSpec | None:
        """The spec its gang was admitted with, if it holds one that can be read."""
        if self.status.admitted_spec is None:
            return None
        try:
            return TrainingJobSpec.model_validate(self.status.admitted_spec)
        except ValueError:
            # Written by another version of the operator, or forged: the live spec is the better truth.
            return None


def job_of(obj: Mapping[str, Any], before: Job | None = None) -> Job:
    """A TrainingJob as the API server has it. Never raises on what a user wrote: that becomes `problems`.

    `before` saves reading the spec again where it is known to be the same (by UID and generation).
    """
    metadata = obj["metadata"]
    generation = int(metadata.get("generation", 0))
    if before is not None and before.uid == metadata["uid"] and before.generation == generation and before.spec:
        checked = Checked(before.spec, ())
    else:
        checked = check_job(dict(obj))
    raw_status = obj.get("status") or {}
    try:
        status = TrainingJobStatus.model_validate(raw_status)
    except ValueError:
        # Whoever may write status may also garble it; the truth is in the pods, so begin again from them.
        status = TrainingJobStatus()
    return Job(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=generation,
        resource_version=str(metadata.get("resourceVersion", "")),
        created_at=seconds(metadata.get("creationTimestamp")) or 0.0,
        deleting=bool(metadata.get("deletionTimestamp")),
        spec=checked.spec,
        problems=checked.problems,
        status=status,
        raw_status=raw_status,
    )


@dataclass(frozen=True)
class Ended:
    """How the training container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    """The termination message: JSON where the agent wrote it."""
    finished_at: float | None = None


@dataclass(frozen=True)
class Pod:
    namespace: str
    name: str
    uid: str
    owner_name: str
    owner_uid: str
    """Name and UID of the controlling TrainingJob; empty for pods of others."""
    slot: int
    incarnation: int
    phase: str
    resource_version: str = ""
    ip: str = ""
    node: str = ""
    deletion_at: float | None = None
    """When its grace ends or ended, if it has been asked to leave."""
    created_at: float = 0.0
    ended: Ended | None = None
    reason: str = ""
    """Reason of the pod as a whole, e.g. Evicted."""
    message: str = ""
    disruption: str = ""
    """Reason of the DisruptionTarget condition where the server sets it."""
    unschedulable: str = ""
    """The scheduler's message while it finds no node."""
    waiting: str = ""
    """Why the container is not started, e.g. ImagePullBackOff."""
    waiting_message: str = ""

    @property
    def over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def leaving(self) -> bool:
        return self.deletion_at is not None


def pod_of(obj: Mapping[str, Any]) -> Pod:
    metadata, status = obj["metadata"], obj.get("status") or {}
    labels = metadata.get("labels") or {}
    owner: Mapping[str, Any] = next(
        (
            ref
            for ref in metadata.get("ownerReferences") or []
            if ref.get("controller") and ref.get("kind") == KIND and ref.get("apiVersion") == API_VERSION
        ),
        {},
    )
    conditions = {item.get("type"): item for item in status.get("conditions") or []}
    containers = status.get("containerStatuses") or []
    ended: Ended | None = None
    waiting: Mapping[str, Any] = {}
    for container in [*(status.get("initContainerStatuses") or []), *containers]:
        state = container.get("state") or {}
        terminated = state.get("terminated")
        if terminated and (container in containers or terminated.get("exitCode") != 0):
            ended = Ended(
                exit_code=int(terminated.get("exitCode", 1)),
                reason=terminated.get("reason") or "",
                message=terminated.get("message") or "",
                finished_at=seconds(terminated.get("finishedAt")),
            )
        waiting = waiting or state.get("waiting") or {}
    scheduled = conditions.get("PodScheduled") or {}
    unbound = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    return Pod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        owner_name=owner.get("name", ""),
        owner_uid=owner.get("uid", ""),
        slot=_whole(labels.get(SLOT_LABEL)),
        incarnation=_whole(labels.get(INCARNATION_LABEL)),
        phase=status.get("phase") or "Pending",
        resource_version=str(metadata.get("resourceVersion", "")),
        ip=status.get("podIP") or "",
        node=(obj.get("spec") or {}).get("nodeName") or "",
        deletion_at=seconds(metadata.get("deletionTimestamp")),
        created_at=seconds(metadata.get("creationTimestamp")) or 0.0,
        ended=ended,
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        disruption=(conditions.get("DisruptionTarget") or {}).get("reason") or "",
        unschedulable=(scheduled.get("message") or "no node takes it") if unbound else "",
        waiting=waiting.get("reason") or "",
        waiting_message=waiting.get("message") or "",
    )


def _whole(text: Any) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        return -1


@dataclass(frozen=True)
class Node:
    name: str
    ready: bool
    unschedulable: bool = False
    allocatable: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[tuple[str, str, str], ...] = ()
    """(key, value, effect)"""
    not_ready_since: float | None = None
    """By the operator's clock; since when it is suspect."""
    stale: bool = False
    """Its kubelet has stopped renewing its lease; known long before the node's conditions tell."""

    @property
    def suspect(self) -> bool:
        return self.stale or not self.ready


def node_of(obj: Mapping[str, Any], not_ready_since: float | None = None, stale: bool = False) -> Node:
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or [])
    allocatable: dict[str, float] = {}
    for name, value in (status.get("allocatable") or {}).items():
        try:
            allocatable[name] = parse_quantity(value)
        except ValueError:
            continue
    return Node(
        name=obj["metadata"]["name"],
        ready=ready,
        unschedulable=bool(spec.get("unschedulable")),
        allocatable=allocatable,
        labels=obj["metadata"].get("labels") or {},
        taints=tuple((t["key"], t.get("value") or "", t.get("effect") or "") for t in spec.get("taints") or []),
        not_ready_since=None if ready and not stale else not_ready_since,
        stale=stale,
    )


@dataclass(frozen=True)
class Heard:
    """The newest report of a pod's agent, and when it came by the operator's clock."""

    report: Report
    at: float
    since: float = 0.0
    """When its attempt and state were first heard."""
    trail: Trail = field(default_factory=Trail)
    wait: float = 0.0
    """Seconds the agent may be silent after it, for it waits for an answer."""
    steps: Mapping[int, int] = field(default_factory=dict)
    """Optimiser steps done as last told of the two newest attempts that trained: an agent's last word of an attempt may
    come after the next was decided on, and be followed at once by its first word of that one."""

    @property
    def ended(self) -> bool:
        return self.report.state == AgentState.EXITED


@dataclass(frozen=True)
class Verdict:
    """What gang admission says of a waiting job."""

    fits: bool
    reason: str = "Fits"
    message: str = ""
    pods: int | None = None
    """Of a waiting job: how many may be made, where fewer than all do. Of one that runs: how many more would fit."""


@dataclass(frozen=True)
class Limits:
    """Times that are the operator's own, not the job's."""

    settle_seconds: float = 2.0
    """While only consequences of a failure are seen, the report of its cause is awaited for so long: a kubelet looks
    for ended containers once a second, and its word takes a moment more."""
    gang_seconds: float = 120.0
    """A gang that is not wholly placed within this time gives its nodes back and queues again."""
    shrink_seconds: float = 10.0
    """A pod of a gang that may shrink has so long to find a node."""
    snooze_seconds: float = 60.0
    """From a shrink to the first try to grow; doubled with each further shrink within the failure window."""
    progress_seconds: float = 5.0
    """Between status writes that only carry progress."""
    soon_seconds: float = 0.3
    """Between status writes of any other news that no action waits for."""
    silent_seconds: float = 10.0
    """An agent unheard for so long, beyond the wait of its last report, on a suspect node counts as lost with it."""
    overdue_seconds: float = 30.0
    """A pod still there so long after its grace no longer holds its slot: its attempt is fenced."""


@dataclass(frozen=True)
class Observed:
    pods: tuple[Pod, ...] = ()
    """Pods controlled by this very job (by UID)."""
    nodes: Mapping[str, Node] | None = None
    """None where nodes may not be watched."""
    heard: Mapping[str, Heard] = field(default_factory=dict)
    """By pod UID."""
    admission: Verdict | None = None
    """None: not known yet; the job keeps waiting."""
    missing_claims: tuple[str, ...] = ()
    """PersistentVolumeClaims that the job names and that are not there."""
    write_error: str = ""
    """The API server's answer to the last action that failed, e.g. a quota."""
    limits: Limits = Limits()
    grid: Grid = field(default_factory=Grid)
