"""Gang admission: all pods of a job fit at once, or none is made. Pure.

Waiting jobs are taken by priority, then age. A job that must wait holds back the nodes it could use from all that come
after it, so a large gang is not starved by small ones; jobs that share no node with it pass. What was admitted but not
created or placed yet is counted as taken, so two jobs are never promised the same room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trireme_api.job import TrainingJobSpec
from trireme_api.quantity import parse_quantity
from trireme_api.template import Toleration

from trireme_operator.views import Key, Node, Verdict

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Demand:
    """What one pod of a gang asks for, and where it may go."""

    requests: Amounts
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


@dataclass(frozen=True)
class Waiting:
    key: Key
    demand: Demand
    count: int
    priority: int
    created_at: float
    uid: str = ""


@dataclass(frozen=True)
class Taken:
    """Requests that are bound to a node, or promised to a gang and not placed yet (`node` empty)."""

    requests: Amounts
    node: str = ""
    demand: Demand | None = None


def demand_of(spec: TrainingJobSpec) -> Demand:
    """Requests of one pod, limits standing in where there is no request (as the API server defaults them)."""
    resources = spec.template.resources
    amounts = {name: parse_quantity(value) for name, value in {**resources.limits, **resources.requests}.items()}
    amounts["pods"] = 1.0
    return Demand(amounts, dict(spec.template.node_selector), tuple(spec.template.tolerations))


def tolerates(tolerations: Sequence[Toleration], taint: tuple[str, str, str]) -> bool:
    key, value, effect = taint
    if effect not in ("NoSchedule", "NoExecute"):
        return True
    return any(
        t.key == key and (t.effect in (None, effect)) and (t.operator == "Exists" or (t.value or "") == value)
        for t in tolerations
    )


def eligible(node: Node, demand: Demand, *, even_if_down: bool = False) -> bool:
    """Whether pods of this kind may go to the node at all, room aside."""
    if not even_if_down and (not node.ready or node.unschedulable):
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

    def take(self, node: str, requests: Amounts) -> None:
        free = self.free.get(node)
        if free is not None:
            for name, amount in requests.items():
                free[name] = free.get(name, 0.0) - amount

    def place(self, demand: Demand, count: int, barred: frozenset[str] | set[str] = frozenset()) -> int:
        """Places up to `count` pods, fullest nodes first; returns how many found room. Takes the room it gives."""
        names = [n for n, node in self.nodes.items() if n not in barred and eligible(node, demand)]
        room = {name: fits_on(self.free[name], demand.requests) for name in names}
        placed = 0
        for name in sorted(names, key=lambda n: (room[n], n)):
            here = min(room[name], count - placed)
            self.take(name, {what: amount * here for what, amount in demand.requests.items()})
            placed += here
            if placed == count:
                break
        return placed

    def copy(self) -> Room:
        twin = Room(self.nodes.values())
        twin.free = {name: dict(free) for name, free in self.free.items()}
        return twin


def verdicts(nodes: Sequence[Node], taken: Iterable[Taken], waiting: Iterable[Waiting]) -> dict[Key, Verdict]:
    """Who may start now, and why the others may not."""
    room = Room(nodes)
    promised: list[Taken] = []
    for item in taken:
        if item.node:
            room.take(item.node, item.requests)
        else:
            promised.append(item)
    for item in promised:
        room.place(item.demand or Demand(item.requests), 1)
    found: dict[Key, Verdict] = {}
    held: set[str] = set()
    ahead: Key | None = None
    for job in sorted(waiting, key=lambda w: (-w.priority, w.created_at, w.key)):
        most = capacity(nodes, job.demand)
        if most < job.count:
            found[job.key] = Verdict(False, "LargerThanCluster", _never(job, most))
            continue
        trial = room.copy()
        if trial.place(job.demand, job.count, held) == job.count:
            room = trial
            found[job.key] = Verdict(True, "Fits", f"{job.count} pods fit")
            continue
        free_now = room.copy().place(job.demand, job.count)
        if free_now == job.count:
            found[job.key] = Verdict(
                False, "Queued", f"waits behind {'/'.join(ahead or ())}, which came earlier and needs the same nodes"
            )
        else:
            found[job.key] = Verdict(
                False,
                "WaitsForRoom",
                f"needs room for {job.count} pods of {describe(job.demand)} at once; {free_now} would fit now; "
                "starts when others end",
            )
            ahead = job.key
        held |= {node.name for node in nodes if eligible(node, job.demand)}
        ahead = ahead or job.key
    return found


def capacity(nodes: Iterable[Node], demand: Demand) -> int:
    """Pods of this kind that the nodes would hold if they were empty and up."""
    return sum(
        fits_on(node.allocatable, demand.requests) for node in nodes if eligible(node, demand, even_if_down=True)
    )


def _never(job: Waiting, most: int) -> str:
    return (
        f"spec.replicas.desired: {job.count} pods of {describe(job.demand)} are more than the cluster can hold even "
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
