"""What the agent does about a hang: tells of ranks that stand still, takes stacks, reads off them who waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trireme_agent import heartbeats, machine, processes, stacks
from trireme_agent.failure import Evidence, classify
from trireme_agent.heartbeats import Heartbeats
from trireme_agent.machine import Dump, Ended, Kill, Machine
from trireme_agent.stacks import Target, judge, kernel_view, lasting_folder, main_thread
from trireme_api.heartbeat import Heartbeat, heartbeat_name, stacks_name
from trireme_api.protocol import Action, AgentState, Assignment, Cause, Env, ExitCode, Failure, RankStack, Stacks

HUNG = Failure(Cause.HANG, "no step", rank=0, exit=ExitCode.HANG, missing=[1])


def running(procs: int = 2) -> Machine:
    found = Machine(600.0)
    found.assigned(Assignment(1, Action.RUN, procs_per_node=procs), 0.0)
    found.started(list(range(procs)))
    return found


def test_the_assignment_may_ask_for_stacks_once_and_nothing_else_changes() -> None:
    agent = running()
    asked = Assignment(1, Action.RUN, procs_per_node=2, dump=True)
    assert agent.assigned(asked, 1.0) == [Dump()]
    assert (agent.state, agent.stopping) == (AgentState.RUNNING, None)
    assert agent.assigned(asked, 2.0) == []
    assert agent.assigned(Assignment(1, Action.RUN, procs_per_node=2), 3.0) == [], "overtaken on the way"
    assert agent.held is asked
    assert agent.assigned(Assignment(2, Action.HOLD), 4.0) == [Kill(fast=False)]


def test_stacks_of_the_peers_are_taken_before_they_are_killed() -> None:
    agent = running()
    assert agent.ended([Ended(0, ExitCode.HANG, HUNG)], 10.0) == [Dump()]
    assert agent.tick(10.0 + machine.SETTLE_HANG - 0.1, 0.0) == []
    assert agent.tick(10.0 + machine.SETTLE_HANG, 0.0) == [Kill(fast=True)]


def test_a_hang_that_takes_all_ranks_at_once_is_dumped_too() -> None:
    agent = running()
    assert agent.ended([Ended(rank, ExitCode.HANG, HUNG) for rank in (0, 1)], 10.0) == [Dump()]
    assert agent.state is AgentState.EXITED


def test_another_failure_asks_for_no_stacks() -> None:
    crash = Failure(Cause.UNKNOWN, "it broke", rank=0, exit=1)
    assert running().ended([Ended(0, 1, crash)], 10.0) == []


def test_whom_the_rank_misses_stays_in_the_failure() -> None:
    found = classify(Evidence(rank=0, exit=ExitCode.HANG, told=HUNG))
    assert found is not None
    assert (found.cause, found.missing) == (Cause.HANG, [1])


def beat(folder: Path, step: int, **fields: object) -> None:
    (folder / heartbeat_name(0)).write_text(json.dumps({"step": step, "phase": "step", "time": 0.0, **fields}))


def test_pace_and_unease(tmp_path: Path) -> None:
    now = [100.0]
    seen = Heartbeats(str(tmp_path), 1, 1, clock=lambda: now[0])
    assert (seen.unease(), seen.step_seconds(0)) == (0, None)
    for step in (0, 1, 3, 4, 5):  # the third is two steps in one look
        beat(tmp_path, step)
        seen.poll()
        now[0] += 4.0 if step == 1 else 2.0
    assert seen.step_seconds(0) == 2.0
    now[0] -= 2.0
    assert seen.unease() == 0
    numbers = []
    for _ in range(15):
        now[0] += 1.0
        seen.poll()
        numbers.append(seen.unease())
    assert numbers[:3] == [0, 0, 0]
    assert numbers[3:] == list(range(1, 13)), "every second from the fourth on"
    beat(tmp_path, 6)
    seen.poll()
    assert seen.unease() == 0
    beat(tmp_path, 2)
    seen.poll()
    beat(tmp_path, 3)
    seen.poll()
    assert seen.step_seconds(0) is not None, "a step back is no step, and what was learnt stays"


def test_a_rank_whose_pace_is_not_known_is_told_of_now_and_then(tmp_path: Path) -> None:
    now = [0.0]
    seen = Heartbeats(str(tmp_path), 1, 1, clock=lambda: now[0])
    beat(tmp_path, 0)
    seen.poll()
    found = []
    for _ in range(6):
        now[0] += heartbeats.UNEASY_UNLEARNT_SECONDS
        found.append(seen.unease())
    assert found == [1, 2, 3, 4, 5, 6]


FAULTHANDLER = """Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/app/trainer/batches.py", line 12 in fill

Thread 0x00007f2 (most recent call first):
  File "/site/torch/distributed/distributed_c10d.py", line 2806 in all_reduce
  File "/site/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/app/trainer/world.py", line 75 in sum
  File "/app/trainer/train.py", line 190 in step
"""
PY_SPY = """Process 7: python train.py
Python v3.11.7 (/usr/bin/python3.11)

Thread 7 (idle): "MainThread"
    read (data.py:12)
    <module> (train.py:3)
Thread 9 (idle): "pin"
    all_reduce (torch/distributed/distributed_c10d.py:2806)
"""


def test_who_waits_is_read_off_the_main_thread() -> None:
    waits, where = judge(main_thread(FAULTHANDLER))
    assert (waits, where.split(" < ")[0]) == (True, "all_reduce (distributed_c10d.py)")
    assert judge(main_thread(PY_SPY)) == (False, "read (data.py) < <module> (train.py)")
    assert judge([("/site/torch/cuda/streams.py", "synchronize")])[0] is None
    assert judge(main_thread("")) == (None, "")


def test_where_stacks_are_kept() -> None:
    claim = {Env.CHECKPOINT: json.dumps({"uri": "pvc://runs/opt/"}), Env.PVC_ROOT: "/mnt/x"}
    assert lasting_folder(claim, "/logs", 3) == ("/mnt/x/runs/opt/hangs/attempt-3", "pvc://runs/opt/hangs/attempt-3")
    local = {Env.CHECKPOINT: json.dumps({"uri": "/data/run"})}
    assert lasting_folder(local, "/logs", 3) == ("/data/run/hangs/attempt-3",) * 2
    for uri in ("s3://bucket/run", "pvc://runs/../other", ""):
        assert lasting_folder({Env.CHECKPOINT: json.dumps({"uri": uri})}, "/logs", 3)[0] == "/logs/hangs/attempt-3"
    assert lasting_folder({Env.CHECKPOINT: "{"}, "/logs", 1)[0] == "/logs/hangs/attempt-1"
    assert lasting_folder({}, "/logs", 1)[0] == "/logs/hangs/attempt-1"


def collected(dump: stacks.Dump, live: tuple[int, ...] = ()) -> Stacks:
    dump.start()
    began = time.monotonic()
    while dump.result is None:
        assert time.monotonic() < began + 20
        dump.tick(live)
        time.sleep(0.02)
    return dump.result


def test_py_spy_is_asked_where_the_rank_has_no_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the tool: what is tested is how it is called and what is made of its words."""
    tools = tmp_path / "bin"
    tools.mkdir()
    tool = tools / "py-spy"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncat <<\'E\'\n{PY_SPY}E\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        found = collected(stacks.Dump(str(tmp_path), (str(tmp_path / "kept"), "name"), 4, [Target(0, rank.pid)]))
    finally:
        rank.kill()
        rank.wait()
    assert found.path == "name"
    assert found.ranks == [RankStack(0, found.ranks[0].state, "py-spy", False, "read (data.py) < <module> (train.py)")]
    assert (tmp_path / "called").read_text().strip() == f"dump --pid {rank.pid}"
    assert "MainThread" in (tmp_path / "kept" / "rank-4.txt").read_text()


def test_an_ended_ranks_own_stacks_are_kept_and_a_full_disk_costs_only_the_file(tmp_path: Path) -> None:
    (tmp_path / stacks_name(0)).write_text(FAULTHANDLER)
    (tmp_path / "file").write_text("")
    dump = stacks.Dump(str(tmp_path), (str(tmp_path / "file" / "kept"), "name"), 0, [Target(0, None), Target(1, None)])
    found = collected(dump)
    assert [(one.how, one.waits) for one in found.ranks] == [("faulthandler", True), ("none", None)]
    assert "could not be saved" in dump.problem


def test_a_signal_that_would_kill_is_never_sent(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        target = Target(0, rank.pid, int(signal.SIGKILL))
        collected(stacks.Dump(str(tmp_path), (str(tmp_path / "kept"), "name"), 0, [target]))
        assert rank.poll() is None
    finally:
        rank.kill()
        rank.wait()


ANSWERS = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR2, file=open(sys.argv[1], "w"))
print("up", flush=True)
time.sleep(60)
"""


def test_a_stopped_rank_is_continued_for_its_stack_after_its_peers_have_written_theirs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ANSWERS]
    ranks = [
        subprocess.Popen([*command, str(tmp_path / stacks_name(rank))], stdout=subprocess.PIPE) for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            rank.stdout.readline()
        # On a busy machine a rank says that it is up, sleeps while that is written, and runs on before it stays asleep.
        until, asleep = time.monotonic() + 10, 0
        while asleep < 10:
            assert time.monotonic() < until
            asleep = asleep + 1 if all(processes.read_stat(rank.pid).state == "S" for rank in ranks) else 0
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGSTOP)
        targets = [Target(rank, process.pid, int(signal.SIGUSR2)) for rank, process in enumerate(ranks)]
        dump = stacks.Dump(str(tmp_path), (str(tmp_path / "kept"), "name"), 0, targets)
        found = collected(dump, live=tuple(process.pid for process in ranks))
        assert {one.how for one in found.ranks} == {"faulthandler"}
        # As they were before they were woken to write their stacks.
        assert [one.state for one in found.ranks] == ["sleeping", "stopped"]
        first, second = (os.stat(tmp_path / stacks_name(rank)).st_mtime for rank in (0, 1))
        assert second - first > stacks.CONTINUE_AFTER / 2
        assert "process stopped" in (tmp_path / "kept" / "rank-1.txt").read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_the_kernels_view_of_a_process_that_is_gone() -> None:
    assert "gone" in kernel_view(2**22 + 1)
    assert "MainThread" not in kernel_view(os.getpid())
    assert f"thread {os.getpid()} " in kernel_view(os.getpid())


def test_an_old_operator_or_agent_understands_the_new_words() -> None:
    plain = Assignment(1, Action.RUN)
    assert "dump" not in plain.to_json()
    assert Assignment.from_json({**plain.to_json(), "dump": True}).dump is True
    assert Heartbeat.from_json({"step": 1, "phase": "step", "time": 1.0, "stackSignal": 12}).stack_signal == 12
