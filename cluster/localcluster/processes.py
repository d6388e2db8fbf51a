"""Starting long-lived programs, recognising them later, and ending exactly those."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Set

from .report import ClusterError
from .shell import environment
from .state import Process

# Inherited by every child, containerd's shims included, which outlive containerd and are in no record.
OWNER_VARIABLE = "TRIREME_CLUSTER_OWNER"
NODE_VARIABLE = "TRIREME_CLUSTER_NODE"


def start(
    argv: Sequence[str], log: Path, *, owner: str, node: Optional[int] = None, env: Optional[Dict[str, str]] = None
) -> Process:
    """Start a program that outlives this one, its output appended to `log`."""
    marks = dict(env or {})
    marks[OWNER_VARIABLE] = owner
    if node is not None:
        marks[NODE_VARIABLE] = str(node)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as sink:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(marks),
            start_new_session=True,
            cwd="/",
        )
    started = start_time(child.pid)
    if started is None:
        raise ClusterError(f"{os.path.basename(argv[0])} ended at once: see {log}")
    return Process(pid=child.pid, started=started, argv=list(argv), log=str(log), environment=marks)


def start_time(pid: int) -> Optional[int]:
    """Clock ticks after boot at which the process began; None when there is none, or only a zombie."""
    try:
        # The command name may hold spaces and brackets, so split after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def alive(process: Process) -> bool:
    return start_time(process.pid) == process.started


def marked(owner: str, node: Optional[int] = None) -> List[int]:
    """Processes that carry this cluster's mark in their environment (and this node's, when given)."""
    wanted = [f"{OWNER_VARIABLE}={owner}".encode()]
    if node is not None:
        wanted.append(f"{NODE_VARIABLE}={node}".encode())
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if all(mark in variables for mark in wanted):
            found.append(int(entry))
    return found


def node_owners() -> Set[str]:
    """Owners (state folders) of all processes of nodes on this machine, whichever cluster they are of."""
    owners = set()
    for entry in os.listdir("/proc"):
        try:
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0") if entry.isdigit() else []
        except OSError:
            continue
        named = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
        if NODE_VARIABLE.encode() in named and OWNER_VARIABLE.encode() in named:
            owners.add(named[OWNER_VARIABLE.encode()].decode())
    return owners


def kill(process: Process, sig: signal.Signals = signal.SIGKILL, timeout: float = 10.0) -> bool:
    """Signal one recorded process and wait for its end; True when it was running."""
    if not alive(process):
        return False
    os.kill(process.pid, sig)
    deadline = time.monotonic() + timeout
    while alive(process):
        _reap([process.pid])
        if time.monotonic() > deadline:
            os.kill(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + timeout
        time.sleep(0.02)
    return True


def kill_all(pids: Iterable[int], timeout: float = 15.0) -> int:
    """SIGKILL these ids and wait until none is left; returns how many there were."""
    births = {pid: start_time(pid) for pid in pids}
    living: Set[int] = {pid for pid, birth in births.items() if birth is not None}
    count = len(living)
    deadline = time.monotonic() + timeout
    while living:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap(living)
        time.sleep(0.02)
        living = {pid for pid in living if start_time(pid) == births[pid]}
        if living and time.monotonic() > deadline:
            raise ClusterError(f"processes {sorted(living)} do not end on SIGKILL (blocked in the kernel?)")
    return count


def resident_bytes(pid: int) -> int:
    """Resident memory of one process, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _reap(pids: Iterable[int]) -> None:
    """Collect those that were our own children; any other child belongs to whoever imported this module."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
