"""What failed first, why, and which rung of the ladder answers: tables."""

from __future__ import annotations

import json

import pytest
from operator_cases import NOW, Scene, ended, failure, heard, pod
from trireme_api.job import FailurePolicy, LadderStep, Phase, RestartRecord, Restarts, Slot, StopWhen, TrainingJobStatus
from trireme_api.protocol import AgentState, Cause, PhaseTime, RankReport
from trireme_operator.decide.clock import stamp
from trireme_operator.decide.gang import Place
from trireme_operator.decide.recovery import Breakdown, answer, breakdown, first_failure
from trireme_operator.decide.views import Limits, Node, Pod

MESSAGE = json.dumps({"failure": {"cause": "data", "message": "shard 3 is torn", "rank": 5, "exit": 65}})


def place(of: Pod | None, node: Node | None = None, recorded: str | None = "pod-0-1", **said: object) -> Place:
    told = heard("pod-0-1", 1, **said) if said else None  # type: ignore[arg-type]
    return Place(Slot(index=0, incarnation=1, pod_uid=recorded), of, told, node)


FAILED = {
    "oom": (pod("j", 0, phase="Failed", ended=ended(137, reason="OOMKilled")), Cause.OOM, "oom-killed"),
    "sigkill is not oom": (pod("j", 0, phase="Failed", ended=ended(137, reason="Error")), Cause.UNKNOWN, "exit-code"),
    "told": (pod("j", 0, phase="Failed", ended=ended(65, message=MESSAGE)), Cause.DATA, "termination-message"),
    "exit code": (pod("j", 0, phase="Failed", ended=ended(71)), Cause.HANG, "exit-code"),
    "bad recipe": (pod("j", 0, phase="Failed", ended=ended(64)), Cause.USER_ERROR, "exit-code"),
    "not json": (pod("j", 0, phase="Failed", ended=ended(70, message="Traceback")), Cause.NON_FINITE, "exit-code"),
    "hostile json": (pod("j", 0, phase="Failed", ended=ended(1, message='{"failure": 7}')), Cause.UNKNOWN, "exit-code"),
    "no python": (
        pod("j", 0, phase="Failed", ended=ended(128, reason="StartError", message="exec: python3")),
        Cause.USER_ERROR, "start-error",
    ),
    "evicted": (pod("j", 0, phase="Failed", reason="Evicted", message="low on disk"), Cause.INFRASTRUCTURE, "evicted"),
    "preempted": (pod("j", 0, phase="Failed", disruption="PreemptionByScheduler"), Cause.PREEMPTION, "disruption"),
    "node shutdown": (pod("j", 0, phase="Failed", reason="Terminated"), Cause.PREEMPTION, "disruption"),
    "no room on the node": (pod("j", 0, phase="Failed", reason="OutOfcpu"), Cause.INFRASTRUCTURE, "pod-failed"),
    "drained": (pod("j", 0, phase="Failed", ended=ended(75)), Cause.PREEMPTION, "saved-unasked"),
    "gone": (None, Cause.INFRASTRUCTURE, "pod-gone"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILED)
def test_an_ended_pod_is_classified(case: str) -> None:
    of, cause, rule = FAILED[case]
    found = breakdown(place(of), 1, NOW, Limits())
    assert found is not None
    assert (found.cause, found.rule) == (cause, rule)


NOT_FAILED = {
    "running": place(pod("j", 0)),
    "done": place(pod("j", 0, phase="Succeeded", ended=ended(0))),
    "not made yet": place(None, recorded=None),
    "leaving but not gone": place(pod("j", 0, deletion_at=NOW + 30)),
    "failure of an older attempt": place(pod("j", 0), state=AgentState.EXITED, failure=failure()),
    "node not ready for a moment": place(pod("j", 0), Node("n0", False, not_ready_since=NOW - 1)),
    "node not ready, agent speaks": place(
        pod("j", 0), Node("n0", False, not_ready_since=NOW - 100), state=AgentState.RUNNING
    ),
}


@pytest.mark.parametrize("case", NOT_FAILED)
def test_what_is_no_failure(case: str) -> None:
    attempt = 2 if "older" in case else 1
    assert breakdown(NOT_FAILED[case], attempt, NOW, Limits()) is None


def test_an_agents_report_is_heard() -> None:
    found = breakdown(
        place(
            pod("j", 0), state=AgentState.EXITED,
            failure=failure(Cause.OOM, rank=3, exit=1, message="CUDA out of memory"),
        ),
        1, NOW, Limits(),
    )  # fmt: skip
    assert found is not None
    assert (found.cause, found.rank, found.message, found.rule) == (Cause.OOM, 3, "CUDA out of memory", "agent-report")


def test_ranks_that_ended_without_a_word() -> None:
    told = place(pod("j", 0), state=AgentState.EXITED, ranks=[RankReport(0, exit=75), RankReport(1, exit=-11)])
    found = breakdown(told, 1, NOW, Limits())
    assert found is not None
    assert (found.exit, "signal 11" in found.message) == (-11, True)


def test_the_first_failure_is_not_a_consequence() -> None:
    def one(slot: int, at: float, cascade: bool = False, rule: str = "agent-report") -> Breakdown:
        return Breakdown(Cause.UNKNOWN, "m", at, rule, slot, cascade=cascade)

    assert first_failure([one(0, NOW - 1, cascade=True), one(1, NOW)]).slot == 1
    assert first_failure([one(0, NOW), one(1, NOW - 1)]).slot == 1
    assert first_failure([one(0, NOW - 1, rule="saved-unasked"), one(1, NOW)]).slot == 1
    assert first_failure([one(2, NOW), one(1, NOW)]).slot == 1


def status(
    *records: tuple[str, Cause, int, float], charged: bool = True, taken: bool = False
) -> TrainingJobStatus:
    recent = [
        RestartRecord(
            at=stamp(NOW - ago), action=action, cause=cause, step=step, attempt=i + 2, charged=charged, taken=taken  # type: ignore[arg-type]
        )
        for i, (action, cause, step, ago) in enumerate(records)
    ]
    return TrainingJobStatus(restarts=Restarts(recent=recent))


PROCESS, POD, GANG = "RestartProcess", "ReplacePod", "RestartGang"
POLICY = FailurePolicy(
    window_seconds=1000,
    ladder=(LadderStep(action=PROCESS, max=2), LadderStep(action=POD, max=1), LadderStep(action=GANG, max=1)),
    stop_when=StopWhen(same_cause_without_progress=3),
)
U, M = Cause.UNKNOWN, Cause.OOM
LADDER = {
    "first": (status(), U, 0, 9, PROCESS),
    "the pod is lost": (status(), U, 1, 9, POD),
    "processes used up": (status((PROCESS, U, 1, 9.0), (PROCESS, U, 5, 5.0)), U, 0, 9, POD),
    "another cause used them up": (status((PROCESS, M, 1, 9.0), (PROCESS, M, 5, 5.0)), U, 0, 9, PROCESS),
    "pods used up": (status((POD, U, 1, 9.0)), U, 1, 9, GANG),
    "all used up": (
        status((PROCESS, U, 1, 9.0), (PROCESS, U, 2, 8.0), (POD, U, 3, 7.0), (GANG, U, 4, 6.0)),
        U,
        0,
        9,
        None,
    ),
    "used up by two causes": (
        status((PROCESS, U, 1, 9.0), (PROCESS, M, 2, 8.0), (PROCESS, U, 3, 7.0), (POD, M, 4, 6.0)),
        U,
        0,
        9,
        POD,
    ),
    "long ago": (status((PROCESS, U, 1, 2000.0), (PROCESS, U, 2, 1500.0)), U, 0, 9, PROCESS),
    "no progress": (status((PROCESS, U, 9, 9.0), (PROCESS, U, 9, 5.0)), U, 0, 9, None),
    "progress": (status((PROCESS, U, 5, 9.0), (POD, U, 9, 5.0)), U, 0, 9, PROCESS),
    "another cause between": (status((POD, U, 9, 9.0), (PROCESS, M, 9, 5.0)), U, 0, 9, PROCESS),
    "wrong recipe": (status(), Cause.USER_ERROR, 0, 9, None),
    "wrong data": (status(), Cause.DATA, 0, 9, None),
}


@pytest.mark.parametrize("case", LADDER)
def test_the_ladder(case: str) -> None:
    before, cause, minimum, best, action = LADDER[case]
    failed = Breakdown(cause, "message", NOW, "agent-report", 0)
    found = answer(POLICY, before, failed, minimum=minimum, best_step=best, now=NOW)
    assert found.action == action
    if action is None:
        assert "message" in found.message


def test_what_the_cluster_took_is_not_charged() -> None:
    taken = Breakdown(Cause.PREEMPTION, "taken", NOW, "disruption", 0, taken=True, charged=False)
    before = status(*[(POD, Cause.PREEMPTION, 9, 9.0)] * 20, charged=False, taken=True)
    assert answer(POLICY, before, taken, minimum=1, best_step=9, now=NOW).action == POD
    # What a rank merely says of itself is charged: else a script that exits 75 would be started for ever.
    claimed = Breakdown(Cause.PREEMPTION, "saved", NOW, "saved-unasked", 0)
    used = status((PROCESS, Cause.PREEMPTION, 9, 9.0), (PROCESS, Cause.PREEMPTION, 9, 5.0))
    assert answer(POLICY, used, claimed, minimum=0, best_step=9, now=NOW).action is None


def test_the_cause_is_awaited_while_only_consequences_are_seen() -> None:
    scene = Scene().run()
    scene.heard["pod-0-1"] = heard(
        "pod-0-1", 1, AgentState.EXITED, scene.now, failure=failure(Cause.NETWORK, cascade=True)
    )
    decision = scene.decide()
    assert (scene.status.attempt, decision.requeue_after) == (1, pytest.approx(2.0))
    scene.now += 1.5
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure(Cause.OOM, rank=1))
    scene.decide()
    assert scene.status.attempt == 2
    assert scene.status.last_failure is not None
    assert (scene.status.last_failure.cause, scene.status.last_failure.rank) == (Cause.OOM, 1)
    assert scene.status.restarts.by_cause == {"oom": 1}, "one failure, counted once"


def test_a_process_restart_keeps_every_pod_and_a_replacement_only_one() -> None:
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure(exit=-9))
    scene.settle()
    assert [s.incarnation for s in scene.status.slots] == [1, 1]
    scene.hear_all(AgentState.RUNNING)
    scene.settle()
    scene.change_pod("pod-1-1", phase="Failed", ended=ended(137, reason="OOMKilled"))
    scene.settle()
    assert (scene.status.attempt, [s.incarnation for s in scene.status.slots]) == (3, [1, 3])
    restarts = scene.status.restarts
    assert (restarts.process, restarts.pod, restarts.gang, scene.status.restart_count) == (1, 1, 0, 2)


def test_a_pod_that_is_only_leaving_is_waited_for_then_replaced() -> None:
    scene = Scene().run()
    scene.change_pod("pod-0-1", deletion_at=scene.now + 30)
    scene.settle()
    assert scene.status.attempt == 1, "its ranks are saving"
    for uid in ("pod-0-1", "pod-1-1"):
        scene.heard[uid] = heard(uid, 1, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=75)])
    scene.settle()
    assert (scene.status.attempt, [s.incarnation for s in scene.status.slots]) == (2, [2, 1])
    assert not scene.settle()[-1].actions, "the old pod of the slot is not gone yet"
    del scene.pods["pod-0-1"]
    assert [a.slot.incarnation for a in scene.settle()[-1].actions] == [2]  # type: ignore[union-attr]


def test_a_restart_that_takes_too_long_climbs_the_ladder() -> None:
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure())
    scene.settle()
    scene.hear_all(AgentState.WAITING)
    scene.settle()
    scene.now += 121
    scene.settle()
    status_now = scene.status
    assert (status_now.attempt, status_now.phase) == (3, Phase.RECOVERING)
    assert status_now.restarts.recent[-1].action == POD
    assert status_now.last_failure is not None
    assert status_now.last_failure.rule == "recovery-timeout"


def test_the_parts_of_a_recovery_are_measured() -> None:
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure(at=scene.now - 0.4))
    scene.now += 0.2
    scene.decide()
    scene.now += 3
    began = scene.now
    times = PhaseTime(began - 3, began - 2, began - 2, began - 1, began - 0.8, began - 0.5, began)
    scene.hear_all(AgentState.RUNNING, phases=times)
    scene.settle()
    scene.now += 1
    scene.decide()
    assert scene.status.last_failure is not None
    found = scene.status.last_failure.phases
    assert (found.detect, found.decide) == (pytest.approx(0.4), pytest.approx(0.2))
    assert found.replace == pytest.approx(3.0, abs=0.1)
    assert (found.fence, found.rendezvous, found.load) == (1.0, 1.0, 0.5)
    assert found.first_step == 0.5


def test_a_pod_that_left_with_the_old_attempt_is_replaced() -> None:
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure())
    scene.settle()
    scene.change_pod("pod-0-1", phase="Succeeded", ended=ended(0))
    scene.heard["pod-1-1"] = heard("pod-1-1", 2, AgentState.WAITING, scene.now)
    scene.settle()
    assert scene.status.attempt == 2
    scene.now += 11
    scene.settle()
    assert (scene.status.attempt, [s.incarnation for s in scene.status.slots]) == (3, [3, 1])
