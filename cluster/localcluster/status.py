"""How a cluster is, as data. Works on one that is half dead: that is when people ask."""

from __future__ import annotations

from typing import Any, Dict

from . import netns, processes
from .api import Api
from .lifecycle import Cluster
from .node import HOLDER
from .state import State


def status(cluster: Cluster) -> Dict[str, Any]:
    """What runs; `up` is true when every process runs, every node is ready and every cable is in."""
    paths = cluster.paths
    state = State.load(paths.record)
    if state is None:
        remains = cluster.facts(None).strays
        return {"name": paths.name, "up": False, "reason": "no such cluster", "remains": remains}
    api = Api(paths.kubeconfig) if paths.kubeconfig.exists() else None
    ready = api.nodes() if api is not None else {}
    rows: Dict[str, Dict[str, Any]] = {}
    for name, process in state.processes.items():
        running = processes.alive(process)
        memory = processes.resident_bytes(process.pid) if running else 0
        rows[name] = {"pid": process.pid, "running": running, "resident_bytes": memory, "log": process.log}
    plan = state.plan
    cabled = netns.exists(plan.control_namespace)
    nodes = [
        {
            "name": plan.node_name(number),
            "number": number,
            "address": plan.node_address(number),
            "ready": ready.get(plan.node_name(number), False),
            "powered": bool(rows.get(f"{HOLDER}-{number}", {}).get("running")),
            "link": cabled and netns.link_is_up(plan, number),
        }
        for number in state.nodes
    ]
    running = all(row["running"] for row in rows.values())
    return {
        "name": paths.name,
        "up": running and api is not None and api.ready() and all(node["ready"] and node["link"] for node in nodes),
        "version": state.version,
        "kubeconfig": str(paths.kubeconfig),
        "server": f"https://127.0.0.1:{state.host_port}",
        "plan": plan.to_json(),
        "options": state.options,
        "nodes": nodes,
        "processes": rows,
        "resident_bytes": sum(row["resident_bytes"] for row in rows.values()),
    }
