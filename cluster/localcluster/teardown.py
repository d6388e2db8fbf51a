"""Removing every trace of a cluster, from its record where there is one, and by its name and mark in any case."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import List, Optional

from . import cgroups, netns, node, processes
from .paths import ClusterPaths, clusters_dir
from .state import State


def label(paths: ClusterPaths, state: Optional[State]) -> str:
    """What the cluster's namespaces and cgroups are called: as recorded, else as they would be."""
    return state.plan.name if state is not None else paths.label


def strays(paths: ClusterPaths, state: Optional[State]) -> List[int]:
    """Processes of this cluster: marked ones and those in its cgroups."""
    return sorted(set(processes.marked(str(paths.state))) | cgroups.members(label(paths, state)))


def traces(paths: ClusterPaths, state: Optional[State]) -> int:
    """How many things of this cluster are on the machine, its folder aside."""
    name = label(paths, state)
    return len(strays(paths, state)) + len(cgroups.left(name)) + len(netns.of_cluster(name))


def remove_everything(paths: ClusterPaths, state: Optional[State]) -> None:
    """Leave nothing: processes, namespaces with their interfaces and rules, cgroups, files. Safe to repeat."""
    if state is not None:
        for process in state.processes.values():
            processes.kill(process)
    # Until a round finds none: a shim may start something while it is being killed.
    while strays(paths, state):
        processes.kill_all(strays(paths, state))
    name = label(paths, state)
    for namespace in netns.of_cluster(name):
        netns.remove(namespace)
    if cgroups.left(name):
        cgroups.remove(name)
    made = list(state.made_directories) if state is not None else []
    if paths.state.exists():
        for entry in sorted(paths.state.iterdir()):
            if entry.is_dir():
                node.remove_folder(entry)
            else:
                entry.unlink()
        paths.state.rmdir()
    _remove_mount_points(made)
    paths.kubeconfig.unlink(missing_ok=True)


def _remove_mount_points(made: List[str]) -> None:
    """Remove the folders that nodes bound theirs over, or leave that to a cluster that still uses them.

    Removing a folder detaches what other mount namespaces have mounted there.
    """
    for other in sorted(processes.node_owners()):
        heir = State.load(Path(other) / ClusterPaths.RECORD)
        if heir is not None:
            heir.made_directories = sorted({*heir.made_directories, *made})
            heir.save(Path(other) / ClusterPaths.RECORD)
            return
    for folder in sorted(made, key=len, reverse=True):
        _remove_if_empty(Path(folder))


def _remove_if_empty(folder: Path) -> None:
    """Only what we made and nobody has filled since."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def forget_lock(paths: ClusterPaths) -> None:
    """Remove the lock file and the folder of clusters when this was the last one."""
    paths.lock.unlink(missing_ok=True)
    _remove_if_empty(clusters_dir())
