"""The cluster's own network: one namespace for the control plane with a bridge, one per node, cabled by veth pairs.

Nothing is added to the machine's own network namespace: no interface, no route, no firewall rule. No namespace
has a default route, so nothing leaves the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List, Sequence

from .plan import Plan
from .report import ClusterError
from .shell import run, succeeds

FOLDER = Path("/run/netns")
# Jumbo frames: the cables are memory copies, and fewer packets carry the gradients faster.
MTU = 9000


def taken_ranges() -> List[str]:
    """Addresses and routes of the machine, as CIDRs: what a new plan must stay clear of."""
    ranges = []
    for link in json.loads(run(["ip", "-json", "-4", "address", "show"]) or "[]"):
        ranges += [f"{entry['local']}/{entry['prefixlen']}" for entry in link.get("addr_info", []) if "local" in entry]
    routes: List[Any] = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]) or "[]")
    ranges += [route["dst"] for route in routes if route.get("dst") not in (None, "default")]
    return ranges


def exists(namespace: str) -> bool:
    """True when a namespace of that name is mounted (a bare file left by a crash does not count)."""
    return succeeds(["ip", "netns", "exec", namespace, "true"])


def create_control(plan: Plan) -> None:
    """The control plane's namespace, with the bridge that all nodes plug into."""
    space = plan.control_namespace
    run(["ip", "netns", "add", space])
    _ip(space, "link set lo up")
    _ip(space, f"link add {plan.bridge} mtu {MTU} type bridge")
    _ip(space, f"address add {plan.control_address}/{plan.prefix_length} dev {plan.bridge}")
    _ip(space, f"link set {plan.bridge} up")


def create_node(plan: Plan, number: int) -> None:
    """Node i's namespace and its cable to the bridge; forwards between the cable and its pods."""
    space, control = plan.node_namespace(number), plan.control_namespace
    run(["ip", "netns", "add", space])
    _ip(space, "link set lo up")
    # Made straight inside the namespaces, so that the name never appears on the machine.
    _ip(control, f"link add {plan.veth(number)} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {space}")
    _ip(control, f"link set {plan.veth(number)} master {plan.bridge}")
    _ip(control, f"link set {plan.veth(number)} up")
    _ip(space, f"address add {plan.node_address(number)}/{plan.prefix_length} dev eth0")
    _ip(space, "link set eth0 up")
    # Without the rate limit every attempt to leave the machine fails at once instead of hanging.
    inside(space, ["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/icmp_ratelimit"])


def connect(plan: Plan, nodes: Sequence[int]) -> None:
    """Routes to every node's pods, from every other node and from the control plane. Safe to repeat."""
    for number in nodes:
        route = f"route replace {plan.pod_subnet(number)} via {plan.node_address(number)}"
        _ip(plan.control_namespace, route)
        for other in nodes:
            if other != number:
                _ip(plan.node_namespace(other), route)


def set_link(plan: Plan, number: int, up: bool) -> None:
    """Plug or pull node i's cable."""
    _ip(plan.control_namespace, f"link set {plan.veth(number)} {'up' if up else 'down'}")


def link_is_up(plan: Plan, number: int) -> bool:
    """Whether the cable is plugged in (set up, whatever its carrier)."""
    links = json.loads(_ip(plan.control_namespace, f"-json link show {plan.veth(number)}"))
    return "UP" in links[0]["flags"]


def inside(namespace: str, argv: Sequence[str]) -> str:
    """Run a program in a namespace. Not by `ip netns exec`, which remounts /sys and hides the cgroups."""
    return run(enter(namespace, argv))


def enter(namespace: str, argv: Sequence[str]) -> List[str]:
    return ["nsenter", f"--net={FOLDER / namespace}", "--", *argv]


def of_cluster(name: str) -> List[str]:
    """Namespaces that a cluster of this name made, by their names."""
    if not FOLDER.is_dir():
        return []
    return sorted(
        entry.name
        for entry in FOLDER.iterdir()
        if entry.name == f"{name}-control"
        or (entry.name.startswith(f"{name}-node") and entry.name[len(name) + 5 :].isdigit())
    )


def remove(namespace: str) -> None:
    """Delete a namespace; its interfaces, routes and firewall rules go with it."""
    if not succeeds(["ip", "netns", "delete", namespace]):
        path = FOLDER / namespace
        # After a crash or reboot the name can be a bare file with nothing mounted on it.
        succeeds(["umount", "--lazy", str(path)])
        path.unlink(missing_ok=True)
        if path.exists():
            raise ClusterError(f"cannot remove network namespace {namespace}: remove {path} by hand")


def _ip(namespace: str, command: str) -> str:
    return run(["ip", "-netns", namespace, *command.split()])
