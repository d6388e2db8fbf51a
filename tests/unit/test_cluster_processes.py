from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from localcluster import processes
from localcluster.plan import CANDIDATES, Plan
from localcluster.report import ClusterError
from localcluster.shell import run
from localcluster.state import State, boot_id


@pytest.fixture
def owner(tmp_path: Path) -> str:
    return str(tmp_path / "cluster")


def test_a_started_process_is_found_by_its_mark_and_killed_with_its_children(tmp_path: Path, owner: str) -> None:
    # The child outlives its parent, as a shim outlives containerd.
    process = processes.start(["sh", "-c", "sleep 1000 & sleep 1000"], tmp_path / "log", owner=owner, node=2)
    try:
        deadline = time.monotonic() + 10
        while len(processes.marked(owner, 2)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(processes.marked(owner, 2)) == 3
        assert processes.marked(owner, 1) == []
        assert processes.marked(owner + "-other") == []
        assert processes.kill(process)
        assert len(processes.marked(owner)) == 2
    finally:
        processes.kill_all(processes.marked(owner))
    assert processes.marked(owner) == []
    assert not processes.kill(process)


def test_a_later_process_with_the_same_id_is_not_taken_for_the_recorded_one(tmp_path: Path, owner: str) -> None:
    process = processes.start(["sleep", "1000"], tmp_path / "log", owner=owner)
    try:
        assert processes.alive(process)
        process.started -= 1
        assert not processes.alive(process)
        assert not processes.kill(process)
        assert _marked(owner) == [process.pid]
    finally:
        processes.kill_all(processes.marked(owner))


def _marked(owner: str) -> list[int]:
    """The kernel shows a program's environment only some moments after it was started."""
    deadline = time.monotonic() + 5
    while not (found := processes.marked(owner)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_a_zombie_counts_as_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.start_time(child.pid) is None
    child.wait()


def test_a_process_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path, owner: str) -> None:
    process = processes.start(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], tmp_path / "log", owner=owner
    )
    while "ready" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    assert processes.kill(process, signal.SIGTERM, timeout=0.5)
    assert not processes.alive(process)
    processes.kill_all(processes.marked(owner))


def test_a_record_survives_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    state = State(plan=Plan.within("t", CANDIDATES[0]), boot_id=boot_id(), nodes=[1])
    path = tmp_path / "state.json"
    state.save(path)
    assert State.load(path) == state
    assert path.stat().st_mode & 0o077 == 0
    for damage in (path.read_text()[:-20], "{}", "[]", ""):
        path.write_text(damage)
        assert State.load(path) is None
    assert State.load(tmp_path / "absent.json") is None


def test_a_program_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ClusterError, match="not installed"):
        run(["no-such-program-anywhere"])
    with pytest.raises(ClusterError, match=r"exit code 3: second$"):
        run(["sh", "-c", "echo first; echo second >&2; exit 3"])
