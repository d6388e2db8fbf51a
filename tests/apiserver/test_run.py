"""Jobs that really run: the operator, the real agent, and each pod's command as a process of this machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rig import KubeletStandIn, OperatorProcess, World, eventually, script_job

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]

SLEEP = "import os, time; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], flush=True); time.sleep({})"


def uids(pods: list[dict[str, Any]]) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods}


def test_a_job_runs_to_its_end(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    standin = kubelet(run=True)
    created = world.create("two", script_job(2, SLEEP.format(3)))
    world.wait_phase("two", "Running", "Succeeded")
    pods = world.pods("two")
    assert sorted(uids(pods)) == ["two-0-1", "two-1-1"]
    for pod in pods:
        owner = pod["metadata"]["ownerReferences"][0]
        assert (owner["uid"], owner["controller"], owner["kind"]) == (created["metadata"]["uid"], True, "TrainingJob")
    status = world.wait_phase("two", "Succeeded")
    assert status["attempt"] == 1
    assert status["observedGeneration"] == 1
    assert "rank 0 of 2" in standin.output("two-0-1")
    assert "rank 1 of 2" in standin.output("two-1-1")
    eventually(lambda: all(p["status"]["phase"] == "Succeeded" for p in world.pods("two")), "pods end as Succeeded")
    told = {"Admitted", "Running", "Completed"}  # posted beside the work, so a little after it
    eventually(lambda: told <= {event["reason"] for event in world.events("two")}, f"events {told}")


def test_a_killed_rank_comes_back_in_the_same_pods(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    standin = kubelet(run=True)
    world.create("kill", script_job(2, SLEEP.format(3600)))
    world.wait_phase("kill", "Running")
    before = uids(world.pods("kill"))
    began = time.monotonic()
    agent = standin.processes[before["kill-1-1"]]
    os.kill(child_of(agent.pid), signal.SIGKILL)
    eventually(lambda: world.status("kill")["attempt"] == 2, "a second attempt")
    decided = time.monotonic() - began
    world.wait_phase("kill", "Running")
    back = time.monotonic() - began
    status = world.status("kill")
    print(f"killed rank: decided after {decided:.2f} s, all ranks run again after {back:.2f} s")
    assert uids(world.pods("kill")) == before
    assert status["restarts"]["process"] == 1
    assert status["lastFailure"]["exit"] == -9
    assert status["lastFailure"]["rank"] == 1
    assert back < 15


def test_killing_the_operator_costs_a_job_nothing(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operator = operators()
    standin = kubelet(run=True)
    world.create("calm", script_job(2, SLEEP.format(3600)))
    world.wait_phase("calm", "Running")
    pods = uids(world.pods("calm"))
    ranks = {uid: child_of(standin.processes[uid].pid) for uid in pods.values()}
    for _ in range(3):
        operator.kill()
        time.sleep(0.5)
        operator.start()
        time.sleep(2.0)
    assert uids(world.pods("calm")) == pods
    assert {uid: child_of(standin.processes[uid].pid) for uid in pods.values()} == ranks
    status = world.status("calm")
    assert (status["phase"], status["attempt"], status["restartCount"]) == ("Running", 1, 0)


def test_a_lost_pod_is_replaced_and_the_others_stay(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet(run=True)
    world.create("lost", script_job(2, SLEEP.format(3600)))
    world.wait_phase("lost", "Running")
    before = uids(world.pods("lost"))
    path = f"/api/v1/namespaces/{world.namespace}/pods/lost-0-1"
    world.api.request("DELETE", path, {"gracePeriodSeconds": 0})
    eventually(lambda: world.status("lost")["attempt"] == 2, "a second attempt")
    status = world.wait_phase("lost", "Running")
    after = uids(world.pods("lost"))
    assert sorted(after) == ["lost-0-2", "lost-1-1"]
    assert after["lost-1-1"] == before["lost-1-1"]
    assert status["restarts"]["pod"] == 1


AGREE = """
import os, pathlib, signal, sys, time
flag = pathlib.Path({!r})
signal.signal(signal.SIGTERM, lambda *_: flag.touch())
print("up", flush=True)
while not flag.exists() or os.environ["TRIREME_ATTEMPT"] != "1":
    time.sleep(0.05)
sys.exit(75)
"""


def test_an_evicted_pod_takes_the_gang_through_a_save_and_is_not_charged(
    world: World, operators: Operators, kubelet: Kubelets, tmp_path: Path
) -> None:
    """What a drain does: SIGTERM to one pod. Its ranks tell the others (here by a file), all save and exit 75."""
    operators()
    kubelet(run=True)
    # One restart in all: were the eviction charged, or a cascade of it, the job would fail.
    ladder = [{"action": "ReplacePod", "max": 1}]
    code = AGREE.format(str(tmp_path / "asked"))
    world.create("drained", script_job(2, code, failurePolicy={"ladder": ladder}))
    world.wait_phase("drained", "Running")
    before = uids(world.pods("drained"))
    world.api.request("DELETE", f"/api/v1/namespaces/{world.namespace}/pods/drained-1-1")
    eventually(lambda: world.status("drained")["attempt"] == 2, "a second attempt")
    status = world.wait_phase("drained", "Running")
    after = uids(world.pods("drained"))
    assert sorted(after) == ["drained-0-1", "drained-1-2"]
    assert after["drained-0-1"] == before["drained-0-1"], "the other pod stays"
    assert status["attempt"] == 2, "one eviction, one new attempt"
    assert status["lastFailure"]["cause"] == "preemption"
    assert [(record["action"], record["charged"]) for record in status["restarts"]["recent"]] == [("ReplacePod", False)]


def test_suspend_and_resume(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet(run=True)
    world.create("nap", script_job(2, SLEEP.format(3600)))
    world.wait_phase("nap", "Running")
    world.patch("nap", {"runPolicy": {"suspend": True}})
    world.wait_phase("nap", "Suspended")
    eventually(lambda: not world.pods("nap"), "no pods while suspended")
    # What a gang is made of may be changed now, and takes effect with the next attempt.
    world.patch("nap", {"runPolicy": {"suspend": False}, "replicas": {"desired": 3}})
    status = world.wait_phase("nap", "Running")
    assert sorted(uids(world.pods("nap"))) == ["nap-0-2", "nap-1-2", "nap-2-2"]
    assert (status["attempt"], status["restartCount"]) == (2, 0)
    assert status["suspendedSeconds"] > 0


def test_a_wrong_command_fails_at_once_and_says_why(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet(run=True)
    spec = script_job(1)
    spec["template"]["command"] = ["/no/such/program"]
    world.create("wrong", spec)
    status = world.wait_phase("wrong", "Failed")
    assert status["lastFailure"]["cause"] == "user-error"
    assert "/no/such/program" in world.condition("wrong", "Failed")["message"]
    assert status["restartCount"] == 0


def test_a_crash_loop_ends(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet(run=True)
    world.create("loop", script_job(1, "import sys; print('bad luck'); sys.exit(3)"))
    status = world.wait_phase("loop", "Failed", seconds=60)
    assert world.condition("loop", "Failed")["reason"] == "NoProgress"
    assert status["restarts"]["process"] == 2


def child_of(pid: int) -> int:
    """The rank: the agent's child that leads a session of its own."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and int(fields[3]) == int(entry):
                return int(entry)
    raise AssertionError(f"agent {pid} has no rank")
