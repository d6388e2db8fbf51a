"""Sick and leaving nodes: which ones a job avoids after failures, and which it leaves before it is made to. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from trireme_api.job import AvoidedNode, FailureRule
from trireme_api.protocol import Cause
from trireme_api.template import Toleration

from trireme_operator.decide import recovery
from trireme_operator.decide.admission import capacity, cordoned, demand_of, tolerates
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.recovery import Breakdown
from trireme_operator.decide.views import Node

BLAMED = frozenset({Cause.INFRASTRUCTURE, Cause.NETWORK, Cause.HANG})
"""Causes that may lie in the node; a Python exception or a wrong loss does not."""


def expire(draft: Draft) -> None:
    """Nodes that have been avoided long enough get another chance."""
    kept = [node for node in draft.status.avoided_nodes if (seconds(node.until) or 0.0) > draft.now]
    if len(kept) != len(draft.status.avoided_nodes):
        draft.status.avoided_nodes = kept


def blame(draft: Draft, failure: Breakdown, rule: FailureRule | None) -> bool:
    """Puts the node on the job's list if it has failed often enough, or the rule says so. True if it is on it now."""
    status, policy = draft.status, draft.spec.node_policy
    node = failure.node
    if not node or failure.taken or failure.cascade:
        return False
    if any(avoided.name == node for avoided in status.avoided_nodes):
        return True
    recent = recovery.within_window(draft.spec.failure_policy, status, draft.now)
    count = sum(r.node == node and r.cause in BLAMED and not r.taken for r in recent) + (failure.cause in BLAMED)
    often = 0 < policy.avoid_after_failures <= count and failure.cause in BLAMED
    if not often and not (rule is not None and rule.avoid_node):
        return False
    why = f"rule {rule.name}" if rule is not None and rule.avoid_node else f"{count} failures began on it"
    if not _enough_without(draft, [*(avoided.name for avoided in status.avoided_nodes), node]):
        draft.note("NodeNotAvoided", f"{node} should be avoided ({why}), but without it the gang finds no room", True)
        return False
    until = stamp(draft.now + policy.avoid_for_seconds)
    status.avoided_nodes = [*status.avoided_nodes, AvoidedNode(name=node, until=until, reason=why)]
    draft.note("NodeAvoided", f"{node} gets no pod of this job until {until}: {why}", True)
    return True


def forgive(draft: Draft) -> bool:
    """Lets the node that has been avoided longest back in, for without it the gang can never start."""
    if not draft.status.avoided_nodes:
        return False
    first = min(draft.status.avoided_nodes, key=lambda node: (seconds(node.until) or 0.0, node.name))
    draft.status.avoided_nodes = [node for node in draft.status.avoided_nodes if node is not first]
    draft.note("NodeForgiven", f"{first.name} is no longer avoided: without it the cluster cannot hold the gang", True)
    return True


def leave(draft: Draft) -> None:
    """Which nodes the gang is leaving, written before any pod is asked to save and go."""
    status, nodes = draft.status, draft.seen.nodes
    places = (*draft.found, *draft.spares)
    here = {p.pod.node for p in places if p.pod is not None and p.pod.node and not p.pod.over}
    leaving: list[str] = []
    if nodes is not None and draft.spec.node_policy.leave_cordoned:
        tolerations = draft.spec.template.tolerations
        leaving = sorted(name for name in here if name in nodes and asked_to_leave(nodes[name], tolerations))
        # A node that was being left stays so: whether there is room elsewhere must not make the job waver.
        fresh = [name for name in leaving if name not in status.draining]
        if fresh and not _enough_without(draft, leaving, up=True):
            leaving = [name for name in leaving if name in status.draining]
    for name in leaving:
        if name not in status.draining:
            draft.note("Draining", f"{name} is to be left: its ranks save, the gang goes on with a pod elsewhere")
    if leaving != status.draining:
        status.draining = leaving


def asked_to_leave(node: Node, tolerations: Iterable[Toleration]) -> bool:
    """Cordoned, or tainted by people or health checkers. What Kubernetes itself says of a node's state comes and goes,
    and a node that is not there cannot be left in good order. A job that tolerates it stays: its next pod would be
    placed there again, and so without end."""
    if node.suspect:
        return False
    ours = tuple(tolerations)
    return cordoned(node, ours) or any(
        not tolerates(ours, taint) for taint in node.taints if not taint[0].startswith("node.kubernetes.io/")
    )


def _enough_without(draft: Draft, names: Iterable[str], up: bool = False) -> bool:
    """Whether the gang fits the other nodes when they are empty; `up`: those that take pods now."""
    if draft.seen.nodes is None:
        return True
    demand = demand_of(draft.spec, [*(node.name for node in draft.status.avoided_nodes), *names])
    tolerations = draft.spec.template.tolerations
    nodes = [n for n in draft.seen.nodes.values() if not up or not (n.suspect or cordoned(n, tolerations))]
    return capacity(nodes, demand) >= len(draft.found)
