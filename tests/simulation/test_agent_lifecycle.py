"""The agent with real processes and a real HTTPS connection: barrier, end, restart in place, stopping."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_rig import Rig, alive
from trireme_api.protocol import Action, AgentState, Cause, Reached

PRINT_CONTRACT = """
import os
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
         "TRIREME_ATTEMPT"]
print(" ".join(f"{n}={os.environ[n]}" for n in names))
print("leak", [n for n in os.environ if "TOKEN" in n or "COORDINATOR" in n])
"""
SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"
STEPS_ON = """
import json, os, signal, sys, time
local, attempt = os.environ["LOCAL_RANK"], int(os.environ["TRIREME_ATTEMPT"])
path = os.path.join(os.environ["TRIREME_HEARTBEAT_DIR"], f"rank-{local}.json")
def beat(step):
    spent = {"seconds": {"step": step}, "state": "step", "fromStep": 0, "step": step}
    with open(path + ".new", "w") as file:
        json.dump({"step": step, "phase": "step", "time": time.time(), "attempt": attempt, "spent": spent}, file)
    os.replace(path + ".new", path)
def one_more(*_):
    beat(7 + int(local)); sys.exit(1)
signal.signal(signal.SIGTERM, one_more)
beat(7)
time.sleep(600)
"""
SAVER = """
import os, signal, sys, time
def stop(*_):
    time.sleep(0.2); print("saved", os.path.exists(os.environ["TRIREME_STOP_FILE"]), flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
while True: time.sleep(0.05)
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_ranks_wait_at_the_barrier_then_run_with_the_contract_and_the_agent_exits_0(rig: Rig) -> None:
    agent = rig.agent(*rig.script(PRINT_CONTRACT))
    rig.assign(3, Action.HOLD, node_rank=1, world_size=2, master_address="10.0.0.7")
    rig.stub.wait_for(lambda r: r.attempt == 3 and r.state is AgentState.WAITING)
    time.sleep(0.5)
    assert not any(heard.report.ranks and heard.report.ranks[0].pid for heard in rig.stub.heard)
    rig.assign(3, Action.RUN, node_rank=1, world_size=2, master_address="10.0.0.7")
    assert agent.wait() == 0
    for local in (0, 1):
        assert (
            f"[rank {2 + local}] RANK={2 + local} LOCAL_RANK={local} WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 "
            f"MASTER_ADDR=10.0.0.7 MASTER_PORT=29403 TRIREME_ATTEMPT=3"
        ) in agent.output
        assert f"[rank {2 + local}] leak []" in agent.output
    last = rig.stub.heard[-1].report
    assert last.state is AgentState.EXITED
    assert last.failure is None
    assert [rank.exit for rank in last.ranks] == [0, 0]
    assert agent.termination() == {"attempt": 3, "state": "exited", "exit": 0}
    assert "RANK=2" in (rig.folder / "logs" / "rank-2.log").read_text()


def test_a_killed_rank_is_told_at_once_its_peer_is_stopped_and_both_restart_in_place(rig: Rig) -> None:
    agent = rig.agent(*rig.script(SLEEP))
    rig.assign(1)
    pids = [rank.pid for rank in rig.running().report.ranks]
    assert all(pids)
    agent.wait_for_line("[rank 1] up")
    killed = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    heard = rig.stub.wait_for(lambda r: r.failure is not None)
    assert heard.at - killed < 0.5
    assert heard.report.failure is not None
    assert (heard.report.failure.rank, heard.report.failure.exit) == (1, -9)
    assert heard.report.failure.cascade is False
    rig.stub.wait_for(lambda r: r.state is AgentState.EXITED and r.failure is not None)
    assert not alive(pids[0])
    assert agent.process.poll() is None, "the agent waits for a decision"
    assert agent.termination()["failure"]["exit"] == -9

    decided = time.monotonic()
    rig.assign(2)
    again = rig.running(2)
    assert again.at - decided < 1.0
    assert again.report.failure is None
    assert not {rank.pid for rank in again.report.ranks} & set(pids)
    phases = again.report.phases
    assert phases is not None
    assert phases.stopped is not None
    assert phases.started is not None
    assert phases.stopped <= phases.started

    rig.assign(2, Action.STOP)
    assert agent.wait() == 143
    assert not any(alive(rank.pid) for rank in again.report.ranks if rank.pid)


def test_a_newer_attempt_clears_healthy_ranks_away_fast_and_waits_at_the_barrier(rig: Rig) -> None:
    # These ranks ignore SIGTERM, as ranks stuck in a collective do in effect.
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP
    agent = rig.agent(*rig.script(script))
    rig.assign(1)
    pids = [rank.pid for rank in rig.running().report.ranks]
    agent.wait_for_line("[rank 1] up")
    began = time.monotonic()
    rig.assign(2, Action.HOLD)
    heard = rig.stub.wait_for(lambda r: r.attempt == 2 and r.state is AgentState.WAITING)
    assert heard.at - began < 1.5
    assert not any(alive(pid) for pid in pids if pid)
    assert heard.report.failure is None


def test_the_steps_ranks_did_after_the_last_word_of_their_attempt_are_told_in_the_next(rig: Rig) -> None:
    rig.agent(*rig.script(STEPS_ON))
    rig.assign(1)
    rig.stub.wait_for(lambda r: [rank.step for rank in r.ranks] == [7, 7])
    rig.assign(2, Action.HOLD)
    waiting = rig.stub.wait_for(lambda r: r.attempt == 2).report
    assert waiting.before == Reached(1, 8), "local rank 1 did one more"
    # An attempt that never trained hides nothing.
    rig.assign(3, Action.HOLD)
    assert rig.stub.wait_for(lambda r: r.attempt == 3).report.before == Reached(1, 8)
    assert all(heard.report.before is None for heard in rig.stub.heard if heard.report.attempt == 1)


def test_a_stale_assignment_changes_nothing(rig: Rig) -> None:
    rig.agent(*rig.script(SLEEP))
    rig.assign(5)
    pids = [rank.pid for rank in rig.running(5).report.ranks]
    seen = len(rig.stub.heard)
    for action in (Action.STOP, Action.HOLD, Action.RUN):
        rig.assign(4, action)
        time.sleep(0.3)
    rig.assign(5, Action.HOLD)
    time.sleep(0.5)
    assert all(alive(pid) for pid in pids if pid)
    assert all(h.report.attempt == 5 and h.report.state is AgentState.RUNNING for h in rig.stub.heard[seen:])


@pytest.mark.parametrize("how", ["assignment", "signal"])
def test_save_and_stop_gives_ranks_time_and_exits_75(rig: Rig, how: str) -> None:
    agent = rig.agent(*rig.script(SAVER))
    rig.assign(1, grace_seconds=10.0)
    rig.running()
    agent.wait_for_line("[rank 0] up")
    agent.wait_for_line("[rank 1] up")
    if how == "assignment":
        rig.assign(1, Action.SAVE_AND_STOP, grace_seconds=10.0)
    else:
        agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 75
    assert agent.output.count("saved True") == 2
    last = rig.stub.heard[-1].report
    assert last.state is AgentState.EXITED
    assert last.failure is None
    assert [rank.exit for rank in last.ranks] == [75, 75]


def test_ranks_that_do_not_stop_are_killed_when_the_grace_is_over(rig: Rig) -> None:
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP
    agent = rig.agent(*rig.script(script))
    rig.assign(1, grace_seconds=1.0)
    rig.running()
    agent.wait_for_line("[rank 1] up")
    began = time.monotonic()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 137
    assert 0.8 < time.monotonic() - began < 4
    assert "did not save and stop within 0.9 s" in rig.stub.heard[-1].report.failure.message


def test_sigterm_before_any_assignment_ends_the_agent(rig: Rig) -> None:
    agent = rig.agent(*rig.script(SLEEP))
    rig.stub.wait_for(lambda r: r.attempt == 0)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 75


def test_a_second_sigterm_kills_at_once(rig: Rig) -> None:
    script = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP
    agent = rig.agent(*rig.script(script))
    rig.assign(1, grace_seconds=60.0)
    rig.running()
    agent.wait_for_line("[rank 1] up")
    agent.process.send_signal(signal.SIGTERM)
    agent.wait_for_line("saving and stopping")
    began = time.monotonic()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 143
    assert time.monotonic() - began < 3


def test_a_python_exception_is_told_with_its_traceback_and_stop_makes_its_code_the_agents(rig: Rig) -> None:
    crash = "import os, time\nif os.environ['RANK'] == '0':\n    raise ValueError('no such luck')\ntime.sleep(600)\n"
    agent = rig.agent(*rig.script(crash))
    rig.assign(1)
    failure = rig.stub.wait_for(lambda r: r.failure is not None).report.failure
    assert failure is not None
    assert failure.cause is Cause.UNKNOWN
    assert failure.message == "rank 0: exit 1: ValueError: no such luck"
    assert failure.traceback is not None
    assert failure.traceback.endswith("ValueError: no such luck")
    rig.stub.wait_for(lambda r: r.state is AgentState.EXITED)
    rig.assign(1, Action.STOP)
    assert agent.wait() == 1
    assert agent.termination()["failure"]["traceback"].endswith("ValueError: no such luck")


def test_a_rank_that_lost_its_peer_never_hides_the_peers_own_failure(rig: Rig) -> None:
    script = """
import os, sys, time
if os.environ["RANK"] == "0":
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
time.sleep(0.15)
raise KeyError("the root")
"""
    agent = rig.agent(*rig.script(script))
    rig.assign(1)
    ended = rig.stub.wait_for(lambda r: r.state is AgentState.EXITED)
    first = rig.stub.wait_for(lambda r: r.failure is not None).report.failure
    assert first is not None
    assert ended.report.failure is not None
    if first.rank == 0:
        assert (first.cause, first.cascade) == (Cause.NETWORK, True)
    assert (ended.report.failure.rank, ended.report.failure.cascade) == (1, False)
    assert agent.process.poll() is None


def test_a_command_that_does_not_exist_is_a_users_error(rig: Rig) -> None:
    rig.agent("no-such-program")
    rig.assign(1)
    failure = rig.stub.wait_for(lambda r: r.failure is not None and r.state is AgentState.EXITED).report.failure
    assert failure is not None
    assert (failure.cause, failure.exit) == (Cause.USER_ERROR, 127)
    assert "no-such-program" in failure.message


def test_nothing_a_rank_started_outlives_it(rig: Rig) -> None:
    script = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
same = subprocess.Popen(sleep)
away = subprocess.Popen(sleep, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
print("children", same.pid, away.pid, flush=True)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    agent = rig.agent(*rig.script(script))
    rig.assign(1, procs_per_node=1)
    rig.stub.wait_for(lambda r: r.state is AgentState.EXITED)
    numbers = [int(n) for line in agent.lines for n in line.split() if n.isdigit() and "[rank 0]" in line]
    assert len(numbers) == 3
    assert not any(alive(pid) for pid in numbers)
    assert "left behind" in agent.output


def test_zombies_are_reaped_while_ranks_run(rig: Rig) -> None:
    script = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.1); os._exit(0)
        os._exit(0)
    os.wait()
print("forked", flush=True)
time.sleep(600)
"""
    agent = rig.agent(*rig.script(script))
    rig.assign(1, procs_per_node=1)
    agent.wait_for_line("forked")
    time.sleep(0.6)
    children = [
        stat
        for stat in (Path(f"/proc/{pid}/stat") for pid in os.listdir("/proc") if pid.isdigit())
        if _parent_and_state(stat) == (agent.process.pid, "Z")
    ]
    assert children == []


def _parent_and_state(path: Path) -> tuple[int, str]:
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return int(fields[1]), fields[0]


UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def _may_unshare() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*UNSHARE, "true"], check=False).returncode == 0


@pytest.mark.skipif(not _may_unshare(), reason="needs the right to make a PID namespace (root)")
def test_as_pid_1_it_adopts_reaps_and_hears_signals(rig: Rig) -> None:
    script = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.2); os._exit(0)   # an orphan of PID 1 that ends while ranks run
    os._exit(0)
os.wait()
time.sleep(0.7)
states = {p: open(f"/proc/{p}/stat").read().rpartition(")")[2].split()[0] for p in os.listdir("/proc") if p.isdigit()}
print("zombies", sum(state == "Z" for state in states.values()), "parent", os.getppid(), flush=True)
while True: time.sleep(0.05)
"""
    agent = rig.agent(*rig.script(script), wrapper=UNSHARE)
    rig.assign(1)
    assert agent.wait_for_line("zombies").endswith("zombies 0 parent 1")
    inner = int(Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text())
    os.kill(inner, signal.SIGTERM)
    assert agent.wait() == 75


def _pythons() -> list[str]:
    """Every Python from 3.9 on that is installed here, this one at least."""
    found = {sys.executable}
    for minor in range(9, 16):
        on_path = shutil.which(f"python3.{minor}")
        found |= {on_path} if on_path else set()
    for path in Path.home().glob(".pyenv/versions/3.*/bin/python3"):
        if tuple(int(part) for part in path.parts[-3].split(".")[:2]) >= (3, 9):
            found.add(str(path))
    return sorted(python for python in found if _works(python))


def _works(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("python", _pythons())
def test_it_runs_under_every_python_there_is_from_3_9_on(rig: Rig, python: str) -> None:
    agent = rig.agent("sh", "-c", "echo $RANK of $WORLD_SIZE; exit 0", python=python)
    rig.assign(1)
    assert agent.wait() == 0
    assert "[rank 1] 1 of 2" in agent.output


def test_rank_output_is_prefixed_whole_lines_of_both_streams(rig: Rig) -> None:
    script = """
import os, sys
for i in range(200):
    sys.stdout.write(f"out {i} "); sys.stdout.flush(); sys.stdout.write("end\\n"); sys.stdout.flush()
sys.stderr.write("err\\n")
sys.stdout.write("10%\\r50%\\r100%\\n")
sys.stdout.write("no newline")
"""
    agent = rig.agent(*rig.script(script))
    rig.assign(1)
    assert agent.wait() == 0
    for rank in (0, 1):
        mine = [line for line in agent.lines if line.startswith(f"[rank {rank}] ")]
        assert [line for line in mine if "out" in line] == [f"[rank {rank}] out {i} end" for i in range(200)]
        assert f"[rank {rank}] err" in mine
        assert f"[rank {rank}] 100%" in mine
        assert mine[-1] == f"[rank {rank}] no newline"
    assert all(line.startswith(("[rank 0] ", "[rank 1] ", "[agent] ")) for line in agent.lines)


def test_bad_settings_are_one_line_and_exit_64(rig: Rig) -> None:
    agent = rig.agent("true", TRIREME_COORDINATOR="http://10.0.0.1:8443")
    assert agent.wait() == 64
    assert len(agent.lines) == 1
    assert "TRIREME_COORDINATOR" in agent.lines[0]
    assert agent.termination()["failure"]["cause"] == "user-error"
