"""A rank is stopped: real agents, real processes, and the operator's own decisions between them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_rig import Rig, alive
from trireme_api.job import Phase, TrainingJobStatus
from trireme_api.protocol import Cause, Env
from trireme_operator.controller import plain_status
from trireme_operator.decide.actions import CreatePod
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.gang import places
from trireme_operator.decide.reconcile import reconcile
from trireme_operator.decide.views import Limits, Observed, Verdict
from trireme_operator.observe.store import Store

KEY = ("ns", "job")
RANK = """
import faulthandler, json, os, signal, sys, time
env, shared, answers = os.environ, sys.argv[1], len(sys.argv) > 2
rank, world, local, attempt = (int(env[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRIREME_ATTEMPT"))
beats = env["TRIREME_HEARTBEAT_DIR"]
if answers:
    faulthandler.register(signal.SIGUSR2, file=open(f"{beats}/stacks-{local}.txt", "w"))
def write(path, text):
    with open(path + ".tmp", "w") as file:
        file.write(text)
    os.replace(path + ".tmp", path)
def all_reduce(step):
    write(f"{shared}/{attempt}-{rank}", str(step))
    for peer in range(world):
        while True:
            try:
                if int(open(f"{shared}/{attempt}-{peer}").read()) >= step:
                    break
            except (OSError, ValueError):
                pass
            time.sleep(0.02)
for step in range(1, 100_000):
    time.sleep(0.2)
    all_reduce(step)
    beat = {"step": step, "phase": "step", "time": time.time(), "attempt": attempt}
    write(f"{beats}/rank-{local}.json", json.dumps({**beat, **({"stackSignal": 12} if answers else {})}))
"""


class Operator:
    """Store, reconcile and assignments as in the operator; the API server is this object."""

    def __init__(self, rigs: list[Rig], procs: int) -> None:
        self.rigs, self.store, self.version = rigs, Store(), 1
        self.read = [0] * len(rigs)
        self.notes: list[str] = []
        template = {"image": "i", "command": ["c"], "resources": {"requests": {"cpu": 1}}}
        self.job = {
            "apiVersion": "trireme.dev/v1alpha1", "kind": "TrainingJob",
            "metadata": {"name": "job", "namespace": "ns", "uid": "uid", "generation": 1, "resourceVersion": "1"},
            "spec": {"replicas": {"desired": len(rigs)}, "procsPerNode": procs, "template": template},
        }  # fmt: skip
        self.store.put_job(self.job)

    @property
    def status(self) -> TrainingJobStatus:
        return self.store.jobs[KEY].status

    def turn(self) -> None:
        for slot, rig in enumerate(self.rigs):
            for heard in rig.stub.heard[self.read[slot] :]:
                self.read[slot] += 1
                self.store.hear(f"uid-{slot}", heard.report, time.time())
        while True:
            job = self.store.jobs[KEY]
            decision = reconcile(job, self._seen(), time.time())
            if decision.status is None:
                break
            self.version += 1
            self.notes += [f"{note.reason}: {note.message}" for note in decision.notes]
            metadata = {**self.job["metadata"], "resourceVersion": str(self.version)}
            self.job = {**self.job, "metadata": metadata, "status": plain_status(decision.status)}
            self.store.put_job(self.job)
        for action in decision.actions:
            assert isinstance(action, CreatePod), "the pods stay: ranks are restarted in place"
            self._create(action)
        job = self.store.jobs[KEY]
        crew = Crew(job, places(job, self._seen()))
        for slot, rig in enumerate(self.rigs):
            assignment = crew.assignment(f"uid-{slot}")
            if assignment.attempt and assignment != rig.stub._assignment:
                rig.stub.assign(assignment)

    def _create(self, action: CreatePod) -> None:
        index = action.slot.index
        owner = {"apiVersion": "trireme.dev/v1alpha1", "kind": "TrainingJob", "name": "job", "uid": "uid"}
        labels = {"trireme.dev/slot": str(index), "trireme.dev/incarnation": str(action.slot.incarnation)}
        metadata = {
            "name": f"job-{index}-{action.slot.incarnation}", "namespace": "ns", "uid": f"uid-{index}",
            "labels": labels, "ownerReferences": [{**owner, "controller": True}],
        }  # fmt: skip
        status = {"phase": "Running", "podIP": "127.0.0.1"}
        self.store.put_pod({"metadata": metadata, "spec": {"nodeName": f"n{index}"}, "status": status})

    def _seen(self) -> Observed:
        return Observed(
            tuple(self.store.pods_of(KEY)), None, dict(self.store.heard), Verdict(True), limits=Limits(soon_seconds=0.0)
        )

    def until(self, reached: Callable[[], bool], timeout: float) -> None:
        end = time.monotonic() + timeout
        while not reached():
            assert time.monotonic() < end, f"{self.status.explanation}\n{self.status.hang}\n{self.notes}"
            self.turn()
            time.sleep(0.02)

    def ranks(self) -> dict[int, tuple[int, int]]:
        """Global rank → (pid, step), as last reported."""
        return {
            slot * len(heard.report.ranks) + rank.local_rank: (rank.pid or 0, rank.step or 0)
            for slot in range(len(self.rigs))
            if (heard := self.store.heard.get(f"uid-{slot}")) is not None
            for rank in heard.report.ranks
        }


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[[int], list[Rig]]]:
    made: list[Rig] = []

    def make(count: int) -> list[Rig]:
        for slot in range(count):
            folder = tmp_path / f"pod-{slot}"
            folder.mkdir()
            made.append(Rig(folder))
        return made

    yield make
    for rig in made:
        rig.close()


@pytest.mark.parametrize(("pods", "procs", "answers"), [(2, 1, True), (1, 2, False)], ids=["2 pods", "own script"])
def test_a_stopped_rank_is_found_in_15_seconds_and_named_with_the_stacks_of_all(
    rigs: Callable[[int], list[Rig]], tmp_path: Path, pods: int, procs: int, answers: bool
) -> None:
    shared, checkpoints = tmp_path / "shared", tmp_path / "checkpoints"
    shared.mkdir()
    gang = rigs(pods)
    for slot, rig in enumerate(gang):
        command = rig.script(RANK, str(shared), *(["answers"] if answers else []))
        extra = {Env.POD: f"job-{slot}-1", Env.POD_UID: f"uid-{slot}", "PATH": "/usr/bin:/bin"}
        rig.agent(*command, **extra, **{Env.CHECKPOINT: f'{{"uri": "{checkpoints}"}}'})
    operator = Operator(gang, procs)
    operator.until(lambda: operator.status.phase == Phase.RUNNING, 30)
    # Only the pod of rank 0 tells its progress all the time.
    learnt = lambda: operator.store.heard["uid-0"].report.ranks[0].step_seconds is not None  # noqa: E731
    operator.until(lambda: learnt() and operator.ranks()[0][1] > 10, 60)
    pid = operator.ranks()[1][0]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.time()
    operator.until(lambda: operator.status.hang is not None, 40)
    hang = operator.status.hang
    assert hang is not None
    took = time.time() - stopped
    print(f"hang seen after {took:.2f} s: {hang.message}")
    assert 10 < took <= 15.5, hang
    operator.until(lambda: operator.status.attempt == 2, 15)
    failed = operator.status.last_failure
    assert failed is not None
    print(f"decided {time.time() - stopped:.2f} s after the stop: {failed.message}")
    assert (failed.cause, failed.rule, failed.attempt) == (Cause.HANG, "hang-watch", 1)
    assert (failed.missing_ranks, failed.rank, failed.pod) == ([1], 1, f"job-{pods - 1}-1")
    assert "rank 1 is stopped" in failed.message
    assert failed.stacks == str(checkpoints / "hangs" / "attempt-1")
    first, second = ((Path(failed.stacks) / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "process stopped" in second
    if answers:
        assert "in all_reduce" in first
        assert "script-0.py" in second
    else:
        assert "stacks by proc" in first
        assert f"thread {pid} " in second
    operator.until(lambda: operator.status.phase == Phase.RUNNING and operator.status.attempt == 2, 30)
    assert not alive(pid)
    before = operator.ranks()[0][1]
    operator.until(lambda: operator.ranks()[0][1] > before + 3, 30)
    assert operator.status.restarts.by_cause == {"hang": 1}
    assert operator.status.restarts.process == 1
    assert seconds(failed.at) is not None
