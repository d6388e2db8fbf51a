"""What the kernel says about memory: the count of processes killed because this pod ran out."""

from __future__ import annotations

import os
from typing import Iterator, Optional


def oom_kills(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> Optional[int]:
    """OOM kills so far in this process's memory cgroup (v2 memory.events, v1 memory.oom_control).

    None where no counter can be read: then an OOM cannot be told from another SIGKILL, and is not claimed.
    """
    for path in _candidates(root, own):
        count = _field(path, "oom_kill")
        if count is not None:
            return count
    return None


def _candidates(root: str, own: str) -> Iterator[str]:
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
        yield os.path.join(root, path, "memory.events")
    for path in dict.fromkeys((v1_path, "")):
        yield os.path.join(root, "memory", path, "memory.oom_control")


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
