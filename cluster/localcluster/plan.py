"""The address plan: which subnets, names and ports a cluster uses, chosen clear of the machine's own. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterable, List

from .report import ClusterError

MAX_NODES = 60
API_PORT = 6443

# Each candidate is a /14 split below; several, so that one in use on the machine only costs the next try.
CANDIDATES = ("10.208.0.0/14", "10.212.0.0/14", "10.124.0.0/14", "10.44.0.0/14", "172.24.0.0/14", "100.84.0.0/14")


@dataclass(frozen=True)
class Plan:
    """Names and subnets of one cluster.

    name      machine-wide: namespaces and cgroups begin with it
    nodes     one /24: the control plane is .1, node i is .(i+1)
    pods      one /16: node i hands out addresses from its i-th /24
    services  one /20: the API server's own service is its first address
    """

    name: str
    nodes: str
    pods: str
    services: str

    @classmethod
    def within(cls, name: str, block: str) -> "Plan":
        """Lay the three ranges out in one /14."""
        network = ipaddress.IPv4Network(block)
        first, second, third = list(network.subnets(new_prefix=16))[:3]
        return cls(
            name=name,
            nodes=str(next(iter(first.subnets(new_prefix=24)))),
            pods=str(second),
            services=str(next(iter(third.subnets(new_prefix=20)))),
        )

    @property
    def control_address(self) -> str:
        return str(ipaddress.ip_network(self.nodes)[1])

    @property
    def prefix_length(self) -> int:
        return ipaddress.ip_network(self.nodes).prefixlen

    @property
    def kubernetes_service(self) -> str:
        return str(ipaddress.ip_network(self.services)[1])

    @property
    def control_namespace(self) -> str:
        return f"{self.name}-control"

    @property
    def bridge(self) -> str:
        return "bridge0"

    def node_name(self, number: int) -> str:
        return f"node{number}"

    def node_namespace(self, number: int) -> str:
        return f"{self.name}-node{number}"

    def node_address(self, number: int) -> str:
        return str(ipaddress.ip_network(self.nodes)[number + 1])

    def pod_subnet(self, number: int) -> str:
        return str(list(ipaddress.ip_network(self.pods).subnets(new_prefix=24))[number])

    def veth(self, number: int) -> str:
        """Name of node i's cable where it enters the control namespace's bridge."""
        return f"to-node{number}"

    def cgroup(self, number: int) -> str:
        return f"/{self.name}/node{number}"

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)


def check_name(name: str) -> None:
    """A cluster name becomes part of network namespace, cgroup and file names."""
    if not name or len(name) > 24 or not all(c.isascii() and (c.isalnum() or c == "-") for c in name) or name[0] == "-":
        raise ClusterError(f"--name {name!r}: use 1 to 24 letters, digits and '-', not starting with '-'")


def check_nodes(count: int) -> None:
    if not 1 <= count <= MAX_NODES:
        raise ClusterError(f"--nodes {count}: must be between 1 and {MAX_NODES}")


def overlaps(block: str, taken: Iterable[str]) -> List[str]:
    """Those of `taken` (CIDRs or addresses) that touch `block`; a default route touches nothing."""
    network = ipaddress.ip_network(block)
    hits = []
    for text in taken:
        other = ipaddress.ip_network(text, strict=False)
        if other.version == network.version and other.prefixlen > 0 and other.overlaps(network):
            hits.append(text)
    return hits


def choose(name: str, taken: Iterable[str]) -> Plan:
    """The first candidate block that no address or route of the machine touches."""
    used = list(taken)
    for block in CANDIDATES:
        if not overlaps(block, used):
            return Plan.within(name, block)
    raise ClusterError(
        "no free address range: "
        + ", ".join(CANDIDATES)
        + " all overlap routes of this machine; remove one or use KUBECONFIG"
    )
