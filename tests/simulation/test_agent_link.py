"""The agent and a coordinator that is away, refuses or comes back; a renewed token; the user's own torch script."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_rig import Rig
from trireme_api.protocol import Action, AgentState

HEARTBEATS = """
import json, os, signal, sys, time
d, r = os.environ["TRIREME_HEARTBEAT_DIR"], int(os.environ["LOCAL_RANK"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("up", flush=True)
for step in range(100000):
    beat = {"step": step, "phase": "step", "time": 0.0, "attempt": int(os.environ["TRIREME_ATTEMPT"]),
            "progress": {"step": step, "loss": 5.0 - step / 1000, "tokensPerSecond": 10.0},
            "phases": {"rendezvous": 1.0 + r, "firstStep": 2.0 + r}}
    with open(f"{d}/tmp-{r}", "w") as f: f.write(json.dumps(beat))
    os.replace(f"{d}/tmp-{r}", f"{d}/rank-{r}.json")
    time.sleep(0.05)
"""
SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_training_goes_on_while_the_coordinator_is_away_and_is_reported_when_it_is_back(rig: Rig) -> None:
    agent = rig.agent(*rig.script(HEARTBEATS), TRIREME_AGENT_REPORT_SECONDS="0.2")
    rig.assign(1)
    pids = [rank.pid for rank in rig.running().report.ranks]
    rig.stub.wait_for(lambda r: r.progress is not None and r.progress.step > 3)
    rig.stub.stop()
    agent.wait_for_line("coordinator does not answer")
    time.sleep(2)
    seen = len(rig.stub.heard)
    before = max(h.report.progress.step for h in rig.stub.heard if h.report.progress)
    rig.stub.start()
    heard = rig.stub.wait_for(lambda r: r.progress is not None, since=seen, timeout=12)
    assert heard.report.progress.step > before + 20
    assert [rank.pid for rank in heard.report.ranks] == pids
    agent.wait_for_line("coordinator is back")


def test_heartbeats_become_progress_ages_and_phases(rig: Rig) -> None:
    agent = rig.agent(*rig.script(HEARTBEATS), TRIREME_AGENT_REPORT_SECONDS="0.2")
    rig.assign(7)
    heard = rig.stub.wait_for(lambda r: r.progress is not None and r.progress.step >= 5)
    report = heard.report
    assert report.progress.loss == pytest.approx(5.0 - report.progress.step / 1000)
    assert all(rank.phase == "step" and rank.heartbeat_age < 1 for rank in report.ranks)
    assert (report.phases.rendezvous, report.phases.first_step) == (2.0, 3.0), "of the last rank to get there"
    os.kill(report.ranks[1].pid, signal.SIGSTOP)
    old = rig.stub.wait_for(
        lambda r: r.ranks and (r.ranks[1].heartbeat_age or 0) > 1.5 and r.ranks[0].heartbeat_age < 1.0
    )
    assert old.report.state is AgentState.RUNNING
    agent.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    os.kill(report.ranks[1].pid, signal.SIGCONT)
    assert agent.wait() == 75


def test_a_failed_pod_that_reaches_nobody_exits_with_the_ranks_code(rig: Rig) -> None:
    agent = rig.agent(*rig.script("import sys, time\nprint('up')\ntime.sleep(2)\nsys.exit(70)\n"),
                      TRIREME_AGENT_PATIENCE_SECONDS="1.5")
    rig.assign(1)
    rig.running()
    agent.wait_for_line("up")
    rig.stub.stop()
    assert agent.wait() == 70
    assert agent.termination()["failure"]["cause"] == "non-finite"


def test_a_failed_pod_waits_for_ever_while_somebody_answers(rig: Rig) -> None:
    agent = rig.agent(*rig.script("import sys\nsys.exit(70)\n"), TRIREME_AGENT_PATIENCE_SECONDS="1")
    rig.assign(1)
    rig.stub.wait_for(lambda r: r.state is AgentState.EXITED)
    for _ in range(15):
        # Each change of the assignment is an answer heard.
        rig.assign(1, grace_seconds=60.0 + time.monotonic())
        time.sleep(0.2)
    assert agent.process.poll() is None


def test_a_crash_while_nobody_answers_is_told_when_somebody_does(rig: Rig) -> None:
    agent = rig.agent(*rig.script("import sys, time\nprint('up')\ntime.sleep(1)\nsys.exit(65)\n"))
    rig.assign(1)
    rig.running()
    agent.wait_for_line("up")
    rig.stub.stop()
    time.sleep(2)
    seen = len(rig.stub.heard)
    rig.stub.start()
    report = rig.stub.wait_for(lambda r: r.failure is not None, since=seen).report
    assert (report.state, report.failure.exit) == (AgentState.EXITED, 65)


def test_the_end_is_reported_even_when_the_coordinator_comes_back_late(rig: Rig) -> None:
    agent = rig.agent(*rig.script("import time\nprint('up')\ntime.sleep(1)\n"))
    rig.assign(1)
    rig.running()
    rig.stub.stop()
    time.sleep(2.5)
    assert agent.process.poll() is None
    rig.stub.start()
    assert agent.wait() == 0
    assert rig.stub.heard[-1].report.state is AgentState.EXITED


def test_the_token_is_read_anew_for_each_call(rig: Rig) -> None:
    agent = rig.agent(*rig.script(SLEEP))
    rig.assign(1)
    rig.running()
    rig.stub.accepted_token = "renewed"
    seen = len(rig.stub.heard)
    rig.stub.assign(rig.assign(1, grace_seconds=61.0))
    agent.wait_for_line("HTTP 401")
    rig.token_file.write_text("renewed\n")
    assert rig.stub.wait_for(lambda r: True, since=seen).token == "renewed"
    assert agent.process.poll() is None


def test_a_lost_answer_is_sent_again(rig: Rig) -> None:
    """The report says which assignment it holds, so an answer that never arrived is not waited out."""
    rig.agent(*rig.script(SLEEP))
    rig.assign(1, Action.HOLD)
    rig.stub.wait_for(lambda r: r.state is AgentState.WAITING and r.attempt == 1)
    rig.stub.status = 503
    rig.assign(1, Action.RUN)
    time.sleep(0.5)
    rig.stub.status = 200
    assert rig.running().report.attempt == 1


def test_a_server_with_another_certificate_is_never_told_anything(rig: Rig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stranger = Rig(other)
    try:
        agent = rig.agent("true", TRIREME_COORDINATOR=stranger.stub.url)
        agent.wait_for_line("CERTIFICATE_VERIFY_FAILED")
        assert stranger.stub.heard == []
    finally:
        stranger.close()


def test_metrics_are_served(rig: Rig) -> None:
    import urllib.request

    agent = rig.agent(
        *rig.script(HEARTBEATS), TRIREME_AGENT_METRICS_PORT="0", TRIREME_CPU_WATTS_PER_CORE="7.5",
    )
    rig.assign(1)
    rig.running()
    port = agent.wait_for_line("metrics at port").rsplit(" ", 1)[1]
    time.sleep(2)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    assert 'trireme_agent_state{state="running"} 1.0' in text
    assert "# TYPE trireme_cpu_energy_joules_total counter" in text
    joules = next(line for line in text.splitlines() if line.startswith("trireme_cpu_energy_joules_total{"))
    assert 'source="declared"' in joules or 'source="rapl"' in joules
    assert float(joules.rsplit(" ", 1)[1]) > 0
    assert 'trireme_agent_rank_step{local_rank="1"}' in text


def test_a_torch_distributed_script_runs_unchanged(rig: Rig) -> None:
    pytest.importorskip("torch")
    script = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(x)
print("sum", x.item(), "of", dist.get_world_size(), dist.is_torchelastic_launched(), flush=True)
dist.destroy_process_group()
"""
    agent = rig.agent(*rig.script(script))
    rig.assign(1, master_port=29871)
    assert agent.wait(60) == 0
    assert agent.output.count("sum 3.0 of 2 True") == 2


def test_a_killed_torch_rank_is_the_root_and_its_peer_a_cascade(rig: Rig) -> None:
    pytest.importorskip("torch")
    script = """
import os, signal, torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(100000):
    x = torch.ones(1)
    dist.all_reduce(x)
    if step == 5 and dist.get_rank() == 1 and os.environ["TRIREME_ATTEMPT"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 20:
        break
print("done", flush=True)
dist.destroy_process_group()  # an exit with gloo's threads alive is an abort, now and then
"""
    agent = rig.agent(*rig.script(script))
    rig.assign(1, master_port=29872)
    report = rig.stub.wait_for(lambda r: r.state is AgentState.EXITED, timeout=60).report
    assert (report.failure.rank, report.failure.exit, report.failure.cascade) == (1, -9, False)
    rig.assign(2, master_port=29873)
    assert agent.wait(60) == 0
    assert agent.output.count("done") == 2
