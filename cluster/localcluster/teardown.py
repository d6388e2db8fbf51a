"""Removing every trace of a cluster, from its record where there is one, and by its name and mark in any case."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import List, Optional

from . import cgroups, netns, node, processes
from .paths import ClusterPaths, clusters_dir
from .state import State


def strays(paths: ClusterPaths) -> List[int]:
    """Processes of this cluster: marked ones and those in its cgroups."""
    return sorted(set(processes.marked(str(paths.state))) | cgroups.members(paths.name))


def remove_everything(paths: ClusterPaths, state: Optional[State]) -> None:
    """Leave nothing: processes, namespaces with their interfaces and rules, cgroups, files. Safe to repeat."""
    if state is not None:
        for process in state.processes.values():
            processes.kill(process)
    # Until a round finds none: a shim may start something while it is being killed.
    while strays(paths):
        processes.kill_all(strays(paths))
    for namespace in netns.of_cluster(paths.name):
        netns.remove(namespace)
    if cgroups.left(paths.name):
        cgroups.remove(paths.name)
    made = list(state.made_directories) if state is not None else []
    if paths.state.exists():
        for entry in sorted(paths.state.iterdir()):
            if entry.is_dir():
                node.remove_folder(entry)
            else:
                entry.unlink()
        paths.state.rmdir()
    for folder in sorted(made, key=len, reverse=True):
        _remove_if_empty(Path(folder))
    paths.kubeconfig.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    """Only what we made and nobody has filled since."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def forget_lock(paths: ClusterPaths) -> None:
    """Remove the lock file and the folder of clusters when this was the last one."""
    paths.lock.unlink(missing_ok=True)
    _remove_if_empty(clusters_dir())
