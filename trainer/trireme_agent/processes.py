"""Small facts about processes that need Linux: who our children are, adopting orphans, CPU time of a session."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from typing import Dict, Iterable, List, Optional, Set

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_TICKS = os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> bool:
    """Orphans of our ranks become our children even where we are not PID 1. False where the kernel cannot."""
    return _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGTERM) -> bool:
    return _prctl(PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> bool:
    try:
        return int(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)) == 0
    except (OSError, AttributeError):
        return False


class Stat:
    """The fields of /proc/<pid>/stat that we use; `cpu` is user and system seconds with waited-for children."""

    __slots__ = ("cpu", "parent", "pid", "session", "state")

    def __init__(self, pid: int, text: str) -> None:
        # The command may hold spaces and brackets; the fields start after the last one.
        fields = text[text.rindex(")") + 2 :].split()
        self.pid = pid
        self.state = fields[0]
        self.parent = int(fields[1])
        self.session = int(fields[3])
        self.cpu = sum(int(value) for value in fields[11:15]) / _TICKS


def read_stat(pid: int) -> Optional[Stat]:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return Stat(pid, file.read())
    except (OSError, ValueError, IndexError):
        return None


def all_stats() -> List[Stat]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    found = (read_stat(int(name)) for name in names if name.isdigit())
    return [stat for stat in found if stat is not None]


def children(of: int, except_for: Iterable[int] = ()) -> List[Stat]:
    skip = set(except_for)
    return [stat for stat in all_stats() if stat.parent == of and stat.pid not in skip]


def descendants(of: int) -> Set[int]:
    by_parent: Dict[int, List[int]] = {}
    for stat in all_stats():
        by_parent.setdefault(stat.parent, []).append(stat.pid)
    found: Set[int] = set()
    queue = [of]
    while queue:
        for pid in by_parent.get(queue.pop(), ()):
            if pid not in found:
                found.add(pid)
                queue.append(pid)
    return found


def signal_group(pgid: int, number: int) -> bool:
    """False when the group has no process left."""
    try:
        os.killpg(pgid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_process(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def cpu_seconds() -> float:
    """CPU seconds of this process and everything it started, ended or not. Never counts other users of the machine."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for pid in descendants(os.getpid()):
        stat = read_stat(pid)
        if stat is not None:
            total += stat.cpu
    return total


def host_busy_seconds(path: str = "/proc/stat") -> Optional[float]:
    """CPU seconds the whole machine was not idle since boot (user, nice, system, irq, softirq, steal)."""
    try:
        with open(path, encoding="utf-8") as file:
            fields = file.readline().split()
    except OSError:
        return None
    if fields[:1] != ["cpu"] or len(fields) < 9:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS
