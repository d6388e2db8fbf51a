"""One cgroup per node, so that no kubelet takes another's pods for its own leftovers. Version 1 and version 2."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import List, Set

from .report import ClusterError

ROOT = Path("/sys/fs/cgroup")
# What a kubelet wants delegated on version 2.
CONTROLLERS_V2 = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


def is_v2() -> bool:
    return (ROOT / "cgroup.controllers").is_file()


def hierarchies() -> List[Path]:
    """Mount points of every hierarchy: one on version 2, one per controller on version 1 (links left out)."""
    if is_v2():
        return [ROOT]
    if not ROOT.is_dir():
        return []
    return sorted(
        path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink() and (path / "cgroup.procs").exists()
    )


def require() -> None:
    """Raise with one line when pods could not be put into cgroups here."""
    mounted = hierarchies()
    names = set((ROOT / "cgroup.controllers").read_text().split()) if is_v2() else {path.name for path in mounted}
    joined = {part for name in names for part in name.split(",")}
    lacking = sorted({"cpu", "memory", "pids", "cpuset"} - joined)
    if lacking:
        raise ClusterError(f"cgroup controllers {', '.join(lacking)} are not mounted under {ROOT}: kubelets need them")
    for path in mounted:
        if not os.access(path, os.W_OK):
            raise ClusterError(f"{path} is read-only: run where cgroups can be made (in a container: --privileged)")


def create(path: str) -> None:
    """Make `/cluster/nodeN` in every hierarchy and let it use all CPUs and controllers."""
    for hierarchy in hierarchies():
        # On a hybrid machine kubelets do not use the unified hierarchy; runc makes what it wants there.
        if hierarchy.name == "unified":
            continue
        current = hierarchy
        for part in path.strip("/").split("/"):
            if is_v2():
                _delegate(current)
            parent, current = current, current / part
            current.mkdir(exist_ok=True)
            # A new version 1 cpuset is empty, and no process can enter it.
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (current / name).exists() and not is_v2() and not (current / name).read_text().strip():
                    (current / name).write_text((parent / name).read_text())
        if is_v2():
            _delegate(current)


def _delegate(group: Path) -> None:
    available = (group / "cgroup.controllers").read_text().split()
    for controller in CONTROLLERS_V2:
        if controller in available:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")


def members(path: str) -> Set[int]:
    """Processes anywhere below `path`, in any hierarchy."""
    found: Set[int] = set()
    for hierarchy in hierarchies():
        for folder, _, _ in os.walk(hierarchy / path.strip("/")):
            try:
                found.update(int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split())
            except OSError:
                continue
    return found


def left(name: str) -> List[Path]:
    """Cgroups of a cluster of this name that exist."""
    return [hierarchy / name for hierarchy in hierarchies() if (hierarchy / name).is_dir()]


def remove(path: str, timeout: float = 10.0) -> None:
    """Remove `path` and everything below it; its processes must be gone."""
    deadline = time.monotonic() + timeout
    for hierarchy in hierarchies():
        top = hierarchy / path.strip("/")
        for folder, _, _ in os.walk(top, topdown=False):
            while True:
                try:
                    os.rmdir(folder)
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    # The kernel empties a cgroup a moment after its last process is gone.
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise ClusterError(f"cannot remove cgroup {folder}: {error.strerror}") from error
                    time.sleep(0.02)
