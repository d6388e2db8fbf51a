"""The rig itself: nothing that a test started outlives it."""

from __future__ import annotations

from pathlib import Path

from agent_rig import Rig, alive

DAEMON = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    os.write(1, f"daemon {os.getpid()}\\n".encode())
    time.sleep(600)
os.write(1, b"up\\n")
time.sleep(600)
"""
"""Whole lines in one write each: unbuffered, `print` writes text and newline apart, and the other process between."""


def test_closing_ends_agents_ranks_and_what_ranks_started(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    agent = rig.agent(*rig.script(DAEMON))
    rig.assign(1)
    ranks = [rank.pid for rank in rig.running().report.ranks if rank.pid]
    daemons = [int(agent.wait_for_line(f"[rank {rank}] daemon").split()[-1]) for rank in (0, 1)]
    started = {agent.process.pid, *ranks, *daemons}
    assert started <= set(rig.started())
    rig.close()
    assert not any(alive(pid) for pid in started)
    assert rig.started() == []


def test_closing_ends_ranks_whose_agent_was_killed(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    agent = rig.agent(*rig.script(DAEMON))
    rig.assign(1)
    ranks = [rank.pid for rank in rig.running().report.ranks if rank.pid]
    agent.wait_for_line("[rank 1] daemon")
    agent.process.kill()
    agent.process.wait(5)
    assert all(alive(pid) for pid in ranks), "ignoring SIGTERM, they outlive it"
    rig.close()
    assert not any(alive(pid) for pid in ranks)
