"""Gang admission: all pods of a job fit at once, or none is made. Pure.

Waiting jobs are taken by priority, then age. A job that must wait holds back the nodes it could use from all that come
after it, so a large gang is not starved by small ones; jobs that share no node with it pass. What was admitted but not
created or placed yet is counted as taken, so two jobs are never promised the same room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from trireme_api.job import TrainingJobSpec
from trireme_api.quantity import parse_quantity
from trireme_api.replicas import Replicas
from trireme_api.template import Toleration

from trireme_operator.decide import sizing
from trireme_operator.decide.views import Key, Node, Verdict

Amounts = Mapping[str, float]
SHOWN_NODES, SHOWN_TROUBLES = 3, 4
"""Of what a message names; a thousand nodes must not make it long."""
CORDONED = ("node.kubernetes.io/unschedulable", "", "NoSchedule")
"""The taint that stands for `kubectl cordon`."""


@dataclass(frozen=True)
class Demand:
    """What one pod of a gang asks for, and where it may go."""

    requests: Amounts
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    avoid: frozenset[str] = frozenset()
    """Nodes by name that it keeps away from."""

    @property
    def kind(self) -> object:
        """Equal for demands that any node answers alike."""
        return tuple(sorted(self.requests.items())), tuple(sorted(self.selector.items())), self.tolerations, self.avoid


@dataclass(frozen=True)
class Waiting:
    key: Key
    demand: Demand
    count: int
    """Pods at best, spares included."""
    priority: int
    created_at: float
    replicas: Replicas | None = None
    """Where it may begin with fewer."""
    ranked: int = 0
    spares: int = 0
    """Of a gang that runs: what it has; `count` is what it would have more."""

    @property
    def least(self) -> int:
        """Pods without which it cannot start."""
        return self.count if self.replicas is None else min(self.count, self.replicas.least)

    def admissible(self, room: int) -> int | None:
        if self.replicas is None:
            return self.count if room >= self.count else None
        return sizing.admissible(self.replicas, room)


@dataclass(frozen=True)
class Taken:
    """Requests that are bound to a node, or promised to a gang and not placed yet (`node` empty)."""

    demand: Demand
    node: str = ""


def demand_of(spec: TrainingJobSpec, avoid: Iterable[str] = ()) -> Demand:
    """Requests of one pod, limits standing in where there is no request (as the API server defaults them)."""
    resources = spec.template.resources
    amounts = {name: parse_quantity(value) for name, value in {**resources.limits, **resources.requests}.items()}
    amounts["pods"] = 1.0
    return Demand(amounts, dict(spec.template.node_selector), tuple(spec.template.tolerations), frozenset(avoid))


def tolerates(tolerations: Sequence[Toleration], taint: tuple[str, str, str]) -> bool:
    key, value, effect = taint
    if effect not in ("NoSchedule", "NoExecute"):
        return True
    return any(
        t.key == key and (t.effect in (None, effect)) and (t.operator == "Exists" or (t.value or "") == value)
        for t in tolerations
    )


def cordoned(node: Node, tolerations: Sequence[Toleration]) -> bool:
    """Closed to new pods, for all but those that tolerate it: the scheduler would put them on it again."""
    return node.unschedulable and not tolerates(tolerations, CORDONED)


def eligible(node: Node, demand: Demand, *, even_if_down: bool = False) -> bool:
    """Whether pods of this kind may go to the node at all, room aside."""
    if node.name in demand.avoid or (not even_if_down and (node.suspect or cordoned(node, demand.tolerations))):
        return False
    if any(node.labels.get(key) != value for key, value in demand.selector.items()):
        return False
    ours = [t for t in node.taints if not (even_if_down and t[0].startswith("node.kubernetes.io/"))]
    return all(tolerates(demand.tolerations, taint) for taint in ours)


def fits_on(free: Amounts, requests: Amounts) -> int:
    """How many such pods the free amounts hold."""
    counts = [int((free.get(name, 0.0) + 1e-9) // amount) for name, amount in requests.items() if amount > 0]
    return max(0, min(counts, default=0))


class Room:
    """Free amounts per node while gangs are placed one after the other."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.free: dict[str, dict[str, float]] = {name: dict(node.allocatable) for name, node in self.nodes.items()}
        self._eligible: dict[object, tuple[str, ...]] = {}
        self._capacity: dict[object, int] = {}
        self._refusals: dict[object, str] = {}

    def eligible(self, demand: Demand) -> tuple[str, ...]:
        """Names of the nodes that pods of this kind may go to now; remembered, for many jobs ask the same."""
        if demand.kind not in self._eligible:
            self._eligible[demand.kind] = tuple(n for n, node in self.nodes.items() if eligible(node, demand))
        return self._eligible[demand.kind]

    def capacity(self, demand: Demand) -> int:
        if demand.kind not in self._capacity:
            self._capacity[demand.kind] = capacity(self.nodes.values(), demand)
        return self._capacity[demand.kind]

    def refusals(self, demand: Demand) -> str:
        """Why no node takes pods of this kind; remembered like the above."""
        if demand.kind not in self._refusals:
            self._refusals[demand.kind] = lacking(self, demand)
        return self._refusals[demand.kind]

    def take(self, node: str, requests: Amounts, times: int = 1) -> None:
        free = self.free.get(node)
        if free is not None:
            for name, amount in requests.items():
                free[name] = free.get(name, 0.0) - amount * times

    def plan(self, demand: Demand, count: int, barred: AbstractSet[str] = frozenset()) -> dict[str, int]:
        """Pods per node for up to `count` pods, fullest nodes first. Takes nothing yet."""
        room = {name: fits_on(self.free[name], demand.requests) for name in self.eligible(demand) if name not in barred}
        found: dict[str, int] = {}
        for name in sorted(room, key=lambda n: (room[n], n)):
            here = min(room[name], count)
            if here:
                found[name] = here
                count -= here
            if not count:
                break
        return found

    def place(self, demand: Demand, plan: Mapping[str, int]) -> None:
        for node, times in plan.items():
            self.take(node, demand.requests, times)


def verdicts(
    nodes: Sequence[Node], taken: Iterable[Taken], waiting: Iterable[Waiting], growing: Iterable[Waiting] = ()
) -> dict[Key, Verdict]:
    """Who may start now, and why the others may not; then, of what is left, who may grow. All of it fits together."""
    room = Room(nodes)
    promised = []
    for item in taken:
        if item.node:
            room.take(item.node, item.demand.requests)
        else:
            promised.append(item.demand)
    for demand in promised:
        room.place(demand, room.plan(demand, 1))
    found: dict[Key, Verdict] = {}
    held: dict[str, Key] = {}
    for job in sorted(waiting, key=lambda w: (-w.priority, w.created_at, w.key)):
        most = room.capacity(job.demand)
        if most < job.least:
            found[job.key] = Verdict(False, "LargerThanCluster", _never(job, most))
            continue
        could_use = room.eligible(job.demand)
        plan = (
            {}
            if could_use and all(name in held for name in could_use)
            else room.plan(job.demand, job.count, held.keys())
        )
        fit = sum(plan.values())
        pods = job.admissible(fit)
        if pods is not None:
            room.place(job.demand, plan if pods == fit else room.plan(job.demand, pods, held.keys()))
            found[job.key] = Verdict(True, "Fits", f"{pods} pods fit", pods)
            continue
        if not could_use:
            found[job.key] = Verdict(
                False,
                "NoNodeReady",
                f"no node that may take pods of {describe(job.demand)} is ready and schedulable now; "
                + room.refusals(job.demand),
            )
            continue
        ahead = next((held[name] for name in could_use if name in held), None)
        if ahead is not None:
            message = f"waits behind {'/'.join(ahead)}, which has precedence on the same nodes"
            found[job.key] = Verdict(False, "Queued", message)
        else:
            message = (
                f"needs room for {job.least} pods of {describe(job.demand)} at once; {fit} would fit now; "
                f"{lacking(room, job.demand, held.keys())}; starts when others end"
            )
            found[job.key] = Verdict(False, "WaitsForRoom", message)
        for name in could_use:
            held.setdefault(name, job.key)
    for job in sorted(growing, key=lambda w: (-w.priority, w.created_at, w.key)):
        plan = room.plan(job.demand, job.count, held.keys())
        more = 0 if job.replicas is None else sizing.extra(job.replicas, job.ranked, job.spares, sum(plan.values()))
        room.place(job.demand, room.plan(job.demand, more, held.keys()))
        found[job.key] = Verdict(more > 0, "Room", f"room for {more} more pods", more)
    return found


def lacking(room: Room, demand: Demand, barred: AbstractSet[str] = frozenset()) -> str:
    """Which node lacks what, nodes of one trouble together: `a, b: nvidia.com/gpu (8 needed, at most 2 free); c: …`."""
    groups: dict[str, list[str]] = {}
    free: dict[str, float] = {}
    for name, node in sorted(room.nodes.items()):
        why = refusal(node, demand) or ("kept for a job before it" if name in barred else "")
        if not why:
            short = [r for r, amount in demand.requests.items() if room.free[name].get(r, 0.0) + 1e-9 < amount]
            for resource in short:
                free[resource] = max(free.get(resource, 0.0), room.free[name].get(resource, 0.0))
            if not short:
                continue  # it has room: what fits now was said before
            why = ", ".join(sorted(short))
        groups.setdefault(why, []).append(name)
    parts = []
    for why, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:SHOWN_TROUBLES]:
        who = ", ".join(names[:SHOWN_NODES]) + (f" and {len(names) - SHOWN_NODES} more" if names[SHOWN_NODES:] else "")
        amounts = [
            f"{r} ({_amount(r, demand.requests[r])} needed, at most {_amount(r, max(0.0, free[r]))} free)"
            for r in why.split(", ")
            if r in free
        ]
        parts.append(f"{who}: {'too little ' + ', '.join(amounts) if amounts else why}")
    return "; ".join(parts) or "there are no nodes"


def refusal(node: Node, demand: Demand) -> str:
    """Why a node takes no pods of this kind, room aside; empty where it does."""
    if node.name in demand.avoid:
        return "avoided after failures"
    if node.suspect:
        return "not ready"
    if cordoned(node, demand.tolerations):
        return "cordoned"
    other = [f"{key}={value}" for key, value in demand.selector.items() if node.labels.get(key) != value]
    if other:
        return f"without the label {' '.join(other)}"
    strange = [taint[0] for taint in node.taints if not tolerates(demand.tolerations, taint)]
    return f"taint {strange[0]} not tolerated" if strange else ""


def capacity(nodes: Iterable[Node], demand: Demand) -> int:
    """Pods of this kind that the nodes would hold if they were empty and up."""
    return sum(
        fits_on(node.allocatable, demand.requests) for node in nodes if eligible(node, demand, even_if_down=True)
    )


def _never(job: Waiting, most: int) -> str:
    field = "min" if job.replicas is not None and job.least < job.replicas.desired else "desired"
    return (
        f"spec.replicas.{field}: {job.least} pods of {describe(job.demand)} are more than the cluster can hold even "
        f"when empty ({most}); lower replicas or template.resources, check template.nodeSelector and tolerations,"
        " or add nodes"
    )


def describe(demand: Demand) -> str:
    amounts = {name: amount for name, amount in demand.requests.items() if name != "pods" and amount}
    parts = [f"{name} {_amount(name, amount)}" for name, amount in sorted(amounts.items())]
    where = [f"{key}={value}" for key, value in sorted(demand.selector.items())]
    return (", ".join(parts) or "no requests") + (f" on {','.join(where)}" if where else "")


def _amount(name: str, amount: float) -> str:
    if name in ("memory", "ephemeral-storage"):
        return f"{amount / 2**30:.3g}Gi"
    return f"{amount:g}"
