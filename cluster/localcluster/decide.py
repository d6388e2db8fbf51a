"""What `up` has to do, given what is there. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional, Set

from .state import State


@dataclass(frozen=True)
class Facts:
    """What was found on the machine.

    alive       recorded processes that run
    namespaces  network namespaces of this cluster's name
    strays      running processes, cgroups and the like that carry this cluster's mark or name
    """

    state: Optional[State]
    boot_id: str
    alive: Set[str] = field(default_factory=set)
    namespaces: Set[str] = field(default_factory=set)
    strays: int = 0


@dataclass(frozen=True)
class Decision:
    """action: `create` on clean ground, `rebuild` after removing remains, `repair` by starting `missing`, or `keep`."""

    action: str
    reason: str
    missing: List[str] = field(default_factory=list)


def expected_processes(nodes: List[int]) -> List[str]:
    """Names of all processes of a whole cluster, in the order in which they start."""
    names = ["etcd", "kube-apiserver", "forwarder", "kube-controller-manager", "kube-scheduler"]
    return names + [
        f"{role}-{number}" for number in nodes for role in ("namespaces", "containerd", "kubelet", "kube-proxy")
    ]


def decide(facts: Facts) -> Decision:
    """Keep what can be kept: a rebuild costs the cluster's contents, so only when its ground is gone."""
    state = facts.state
    if state is None:
        if facts.namespaces or facts.strays:
            return Decision("rebuild", "remains of a cluster without a record")
        return Decision("create", "nothing is there")
    if state.boot_id != facts.boot_id:
        return Decision("rebuild", "the machine was rebooted")
    wanted = {state.plan.control_namespace, *(state.plan.node_namespace(number) for number in state.nodes)}
    if not wanted <= facts.namespaces:
        return Decision("rebuild", "network namespaces are gone: " + ", ".join(sorted(wanted - facts.namespaces)))
    expected = expected_processes(state.nodes)
    missing = [name for name in expected if name not in facts.alive]
    if not missing:
        return Decision("keep", "everything runs")
    if not facts.alive & set(expected):
        return Decision("rebuild", "all processes were killed")
    unfinished = [name for name in expected if name not in state.processes]
    if unfinished:
        return Decision("rebuild", "an earlier `up` did not finish")
    return Decision("repair", "not running: " + ", ".join(missing), missing)
