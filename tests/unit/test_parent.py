"""A rank ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = """
import sys, time
from trireme_trainer.lifecycle.parent import end_with_parent
if sys.argv[1] == "bound":
    assert end_with_parent()
print("up", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(60)
"""


def _gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.02)
    return False


def _orphan(kind: str) -> int:
    """A rank whose parent has just been killed with SIGKILL."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, RANK, kind], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    rank = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    return rank


def test_a_rank_ends_with_its_parent() -> None:
    assert _gone(_orphan("bound"), 5.0)


def test_it_would_not_by_itself() -> None:
    rank = _orphan("free")
    try:
        assert not _gone(rank, 0.5)
    finally:
        os.kill(rank, signal.SIGKILL)
