"""The admission desk: gathers what gang admission needs from the store and keeps its verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trireme_api.job import TERMINAL, Phase, TrainingJobSpec, pod_name
from trireme_api.quantity import parse_quantity

from trireme_operator.decide.admission import Demand, Taken, Waiting, demand_of, verdicts
from trireme_operator.decide.frozen import effective
from trireme_operator.decide.gang import HOLDING
from trireme_operator.decide.streaming import lacks_data
from trireme_operator.decide.views import Job, Key, Verdict
from trireme_operator.observe.store import Store

OPEN = Verdict(True, "Fits", "admission is left to the scheduler")


@dataclass
class Desk:
    store: Store
    foreign: list[Taken] = field(default_factory=list)
    """Room taken by pods of others."""
    priorities: dict[str, int] = field(default_factory=dict)
    """Values of the PriorityClasses that jobs have named."""
    _verdicts: dict[Key, Verdict] = field(default_factory=dict)
    _granted: dict[Key, int] = field(default_factory=dict)
    """Pods of jobs whose admission is being written; counted as taken until the store shows it."""
    _decided_at: int = -1
    """The store's capacity version that the verdicts follow from."""

    def verdict(self, job: Job) -> Verdict | None:
        spec = job.spec
        if spec is None or self.store.nodes is None or spec.scheduling_policy.gang == "none":
            return OPEN
        name = spec.scheduling_policy.priority_class_name
        if name is not None and name not in self.priorities:
            return Verdict(
                False, "PriorityClassNotFound", f"spec.schedulingPolicy.priorityClassName: no PriorityClass {name!r}"
            )
        if job.status.phase in HOLDING and self._decided_at != self.store.capacity_version:
            return None  # room to grow may be gone by now; a running gang can wait until it is known
        return self._verdicts.get(job.key)

    def undecided(self, job: Job) -> bool:
        """Whether the job waits for a verdict that the next `decide` will give."""
        return self.store.nodes is not None and self._waits(job) and job.key not in self._verdicts

    def anyone_waits(self) -> bool:
        return any(self._waits(job) or self._grows(job) for job in self.store.jobs.values())

    def priority_names(self) -> set[str]:
        """PriorityClasses that jobs name."""
        specs = (job.spec for job in self.store.jobs.values() if job.spec is not None)
        return {name for spec in specs if (name := spec.scheduling_policy.priority_class_name)}

    def grant(self, job: Job) -> None:
        """Called before the admission is written, so that no other job is promised the same room meanwhile."""
        verdict = self._verdicts.pop(job.key, None)
        pods = verdict.pods if verdict is not None else None
        self._granted[job.key] = _all_pods(job) if pods is None else pods

    def settle(self, job: Job) -> None:
        """The write succeeded (the store shows it) or failed (the room is free again)."""
        self._granted.pop(job.key, None)
        self.store.capacity_version += 1

    def decide(self) -> set[Key]:
        """New verdicts for all waiting jobs; returns those whose verdict changed."""
        if self.store.nodes is None:
            return set()
        waiting = [self._waiting(job) for job in self.store.jobs.values() if self._waits(job)]
        growing = [self._growing(job) for job in self.store.jobs.values() if self._grows(job)]
        self._decided_at = self.store.capacity_version
        if not waiting and not growing:
            self._verdicts = {}
            return set()
        taken = [*self.foreign, *self._placed(), *self._promised()]
        found = verdicts(list(self.store.nodes.values()), taken, waiting, growing)
        changed = {key for key, verdict in found.items() if self._verdicts.get(key) != verdict}
        self._verdicts = found
        return changed

    def _waits(self, job: Job) -> bool:
        phase = job.status.phase
        if job.spec is None or job.deleting or phase in TERMINAL or phase in HOLDING or job.key in self._granted:
            return False
        if job.status.carbon_hold.reason is not None or lacks_data(job.spec, job.status):
            return False  # no room is kept for who waits for something else
        name = job.spec.scheduling_policy.priority_class_name
        known = name is None or name in self.priorities
        return known and not job.spec.run_policy.suspend and job.spec.scheduling_policy.gang == "builtin"

    def _waiting(self, job: Job) -> Waiting:
        assert job.spec is not None
        replicas = job.spec.replicas
        demand, priority = demand_of(job.spec, _avoided(job)), self._priority(job.spec)
        return Waiting(job.key, demand, _all_pods(job), priority, job.created_at, replicas)

    def _grows(self, job: Job) -> bool:
        """Whether it runs with fewer pods than it asks for."""
        if job.status.phase != Phase.RUNNING or job.spec is None or job.deleting:
            return False
        return job.spec.scheduling_policy.gang == "builtin" and len(job.status.slots) < _all_pods(job)

    def _growing(self, job: Job) -> Waiting:
        spec = effective(job)
        assert spec is not None
        assert job.spec is not None
        slots = job.status.slots
        spares, missing = sum(slot.spare for slot in slots), _all_pods(job) - len(slots)
        ranked = len(slots) - spares
        priority, replicas = self._priority(job.spec), job.spec.replicas
        demand = demand_of(spec, _avoided(job))
        return Waiting(job.key, demand, missing, priority, job.created_at, replicas, ranked, spares)

    def _priority(self, spec: TrainingJobSpec) -> int:
        return self.priorities.get(spec.scheduling_policy.priority_class_name or "", 0)

    def _placed(self) -> Iterable[Taken]:
        """Pods of admitted gangs on their nodes; each asks for what its job's template says."""
        demands: dict[Key, Demand] = {}
        for pod in self.store.pods.values():
            if pod.over or not pod.node:
                continue
            key = pod.namespace, pod.owner_name
            if key not in demands:
                job = self.store.jobs.get(key)
                spec = effective(job) if job is not None else None
                demands[key] = demand_of(spec) if spec is not None else Demand({"pods": 1.0})
            yield Taken(demands[key], pod.node)

    def _promised(self) -> Iterable[Taken]:
        """Slots of admitted gangs whose pod is not on a node yet, and gangs whose admission is just being written."""
        for job in self.store.jobs.values():
            if job.key in self._granted and job.status.phase not in HOLDING and job.spec is not None:
                yield from [Taken(demand_of(job.spec, _avoided(job)))] * self._granted[job.key]
            if job.status.phase not in HOLDING or job.status.phase == Phase.SUSPENDING or job.deleting:
                continue
            spec = effective(job)
            if spec is None:
                continue
            on_node = {pod.name for pod in self.store.pods_of(job.key) if pod.node and pod.owner_uid == job.uid}
            absent = sum(pod_name(job.name, slot) not in on_node for slot in job.status.slots)
            yield from [Taken(demand_of(spec, _avoided(job)))] * absent


def _avoided(job: Job) -> list[str]:
    return [node.name for node in job.status.avoided_nodes]


def _all_pods(job: Job) -> int:
    """Gang and spares as asked for."""
    return job.spec.replicas.desired + job.spec.replicas.spares if job.spec is not None else 0


def foreign_taken(objects: Iterable[Mapping[str, Any]]) -> list[Taken]:
    """What pods of others take on their nodes."""
    found = []
    for obj in objects:
        spec = obj.get("spec") or {}
        if spec.get("nodeName"):
            found.append(Taken(Demand(pod_requests(spec)), spec["nodeName"]))
    return found


def pod_requests(spec: Mapping[str, Any]) -> dict[str, float]:
    """Requests of a pod as the scheduler counts them: sum of the containers, or the largest init container."""
    total: dict[str, float] = {}
    for container in spec.get("containers") or []:
        for name, amount in _requests(container).items():
            total[name] = total.get(name, 0.0) + amount
    for container in spec.get("initContainers") or []:
        for name, amount in _requests(container).items():
            total[name] = max(total.get(name, 0.0), amount)
    for name, value in (spec.get("overhead") or {}).items():
        total[name] = total.get(name, 0.0) + parse_quantity(value)
    total["pods"] = 1.0
    return total


def _requests(container: Mapping[str, Any]) -> dict[str, float]:
    resources = container.get("resources") or {}
    both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: parse_quantity(value) for name, value in both.items()}
