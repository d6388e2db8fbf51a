"""What the kernel says about this pod's memory: how much is in use, how many processes were killed for want of it."""

from __future__ import annotations

import os
from typing import Iterator, Optional

ROOT = "/sys/fs/cgroup"
OWN = "/proc/self/cgroup"


def oom_kills(root: str = ROOT, own: str = OWN) -> Optional[int]:
    """OOM kills so far in this process's memory cgroup.

    None where no counter can be read: then an OOM cannot be told from another SIGKILL, and is not claimed.
    """
    for path in _files("memory.events", "memory.oom_control", root, own):
        count = _field(path, "oom_kill")
        if count is not None:
            return count
    return None


def memory_bytes(root: str = ROOT, own: str = OWN) -> Optional[int]:
    """Memory in use by this pod, page cache included; None where it cannot be read."""
    for path in _files("memory.current", "memory.usage_in_bytes", root, own):
        try:
            with open(path, encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return None


def _files(v2_name: str, v1_name: str, root: str, own: str) -> Iterator[str]:
    v1_path = v2_path = ""
    try:
        with open(own, encoding="utf-8") as lines:
            for line in lines:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                if controllers == "":
                    v2_path = path.lstrip("/")
                elif "memory" in controllers.split(","):
                    v1_path = path.lstrip("/")
    except (OSError, ValueError):
        pass
    # In a container the own path is "/" or does not exist below the mount: then the root is ours.
    for path in dict.fromkeys((v2_path, "")):
        yield os.path.join(root, path, v2_name)
    for path in dict.fromkeys((v1_path, "")):
        yield os.path.join(root, "memory", path, v1_name)


def _field(path: str, name: str) -> Optional[int]:
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(" ")
                if key == name:
                    return int(value)
    except (OSError, ValueError):
        return None
    return None
