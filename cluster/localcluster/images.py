"""Bringing image archives to the nodes of whichever cluster is used, without a registry."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Sequence

from . import archive, backend, kind
from . import binaries as binary_files
from .lifecycle import Cluster
from .node import HOLDER, Node
from .paths import ClusterPaths
from .report import ClusterError, say
from .state import locked


def load(choice: backend.Choice, name: str, archives: Sequence[Path]) -> List[Dict[str, Any]]:
    """Import into every node that is on; returns per archive its image names and the nodes that needed it."""
    for path in archives:
        archive.images(path)
    if choice.kind == backend.EXISTING:
        names = ", ".join(image for path in archives for image in archive.images(path))
        raise ClusterError(
            f"KUBECONFIG names a cluster of your own: push {names} to a registry that it can reach instead "
            "(`make` does with TRIREME_REGISTRY=registry.example/prefix, or takes them as there with "
            "TRIREME_IMAGES=preloaded)"
        )
    if choice.kind == backend.KIND:
        for path in archives:
            kind.load(ClusterPaths(name), path)
        return [
            {"archive": str(path), "images": sorted(archive.images(path)), "imported": ["all"]} for path in archives
        ]
    return _load_builtin(Cluster(name), archives)


def _load_builtin(cluster: Cluster, archives: Sequence[Path]) -> List[Dict[str, Any]]:
    report = []
    with locked(cluster.paths):
        state = cluster.require()
        programs = binary_files.find(nodes=True)
        nodes = [Node(cluster.paths, state, programs, number) for number in state.nodes]
        off = [node.name for node in nodes if node.running(HOLDER) is None]
        if off:
            say(f"  note: {', '.join(off)} is switched off and gets no image")
        nodes = [node for node in nodes if node.name not in off]
        for path in archives:
            began = time.monotonic()
            # More at once only wait for each other: unpacking is bound by the disk and two processors.
            with ThreadPoolExecutor(max_workers=2) as pool:
                imported = [
                    node.name
                    for node, new in zip(nodes, pool.map(lambda node, path=path: node.load(path), nodes), strict=False)
                    if new
                ]
            names = sorted(archive.images(path))
            what = f"into {', '.join(imported)}" if imported else "is already on every node"
            say(f"  {', '.join(names)} {what} ... {time.monotonic() - began:.1f} s")
            report.append({"archive": str(path), "images": names, "imported": imported})
    return report
