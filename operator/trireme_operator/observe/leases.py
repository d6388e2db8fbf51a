"""Which kubelets have fallen silent, from the leases they renew; judged by changes seen here, never by their clocks.

Pure. Kubernetes says NotReady 40 to 50 s after a node's last sign; a lease is renewed after a quarter of its duration,
which is 10 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NAMESPACE = "kube-node-lease"
SAMPLE_SECONDS = 3.0
MISSED = 1.5
"""Renewals a kubelet may be late by before it counts as silent: one missed, and half the time to the next."""
LONGEST_GAP_SECONDS = 12.0
"""Samples further apart prove nothing: an API server that was away kept kubelets from renewing, too."""


@dataclass(frozen=True)
class Renewal:
    node: str
    at: str
    """As the kubelet wrote it: only compared for being the same."""
    every: float
    """Seconds between renewals."""


def renewal_of(obj: Mapping[str, Any]) -> Renewal:
    spec = obj.get("spec") or {}
    duration = spec.get("leaseDurationSeconds")
    seconds = float(duration) if isinstance(duration, int) and duration > 0 else 40.0
    return Renewal(obj["metadata"]["name"], str(spec.get("renewTime") or ""), max(1.0, seconds / 4))


@dataclass
class Leases:
    """Not thread-safe; `now` is seconds of one clock."""

    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    """The newest renewal of each node and when it was first seen."""
    _sampled_at: float | None = None

    def sample(self, renewals: Iterable[Renewal], now: float) -> set[str]:
        """Takes in all leases as they are now; returns the nodes whose kubelet is silent."""
        found = list(renewals)
        gap = self._sampled_at is None or not 0 <= now - self._sampled_at <= LONGEST_GAP_SECONDS
        self._sampled_at = now
        before = {} if gap else self._seen
        self._seen = {}
        stale = set()
        for one in found:
            at, since = before.get(one.node, ("", now))
            self._seen[one.node] = (one.at, since if at == one.at else now)
            if now - self._seen[one.node][1] >= one.every * MISSED:
                stale.add(one.node)
        # Most nodes at once is no loss of nodes: something between them and here is broken.
        return stale if 2 * len(stale) <= len(found) else set()
