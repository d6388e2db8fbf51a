"""Every row of the table of causes: what the cluster and the pod say, what that is taken for, and what follows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from operator_cases import Scene, ended, failure, heard
from trireme_api.job import Phase
from trireme_api.protocol import AgentState, Cause, RankReport
from trireme_api.validation import check_job

DONE = "Running"
"""The job goes on as if nothing had happened."""


@dataclass(frozen=True)
class Row:
    """One pod's signs, and the verdict on them."""

    cause: Cause | None
    action: str | None
    """None: the job ends; else the last restart."""
    charged: bool = True
    pod: dict[str, Any] | None = None
    said: dict[str, Any] | None = None
    gone: bool = False


def crashed(code: int, reason: str = "Error", **fields: Any) -> dict[str, Any]:
    return {"phase": "Failed", "ended": ended(code, reason=reason, **fields)}


def reported(cause: Cause, code: int | None, **fields: Any) -> dict[str, Any]:
    return {"state": AgentState.EXITED, "failure": failure(cause, exit=code, rank=1, **fields)}


def exits(*codes: int) -> dict[str, Any]:
    return {"state": AgentState.EXITED, "ranks": [RankReport(i, exit=code) for i, code in enumerate(codes)]}


def told(**fields: Any) -> str:
    return json.dumps({"failure": {"message": "m", **fields}})


PROCESS, POD = "RestartProcess", "ReplacePod"
TABLE = {
    # (1) conditions of the API server: the cluster took the pod away, the job pays nothing
    "preempted": Row(Cause.PREEMPTION, POD, False, {"phase": "Failed", "disruption": "PreemptionByScheduler"}),
    "evicted by the API": Row(Cause.PREEMPTION, POD, False, {"phase": "Failed", "disruption": "EvictionByEvictionAPI"}),
    "taint": Row(Cause.INFRASTRUCTURE, POD, False, {"phase": "Failed", "disruption": "DeletionByTaintManager"}),
    "pod GC": Row(Cause.INFRASTRUCTURE, POD, False, {"phase": "Failed", "disruption": "DeletionByPodGC"}),
    "kubelet": Row(Cause.INFRASTRUCTURE, POD, False, {"phase": "Failed", "disruption": "TerminationByKubelet"}),
    "node shuts down": Row(Cause.PREEMPTION, POD, False, {"phase": "Failed", "reason": "Terminated"}),
    "a reason yet unknown": Row(Cause.PREEMPTION, POD, False, {"phase": "Failed", "disruption": "Whatever"}),
    "disrupted, and the rank cried": Row(
        Cause.PREEMPTION, POD, False,
        {**crashed(1, message=told(cause="user-error")), "disruption": "PreemptionByScheduler"},
    ),
    "used up the node's disk": Row(
        Cause.INFRASTRUCTURE, POD, True, {"phase": "Failed", "reason": "Evicted", "disruption": "TerminationByKubelet"}
    ),
    "no room on the node": Row(Cause.INFRASTRUCTURE, POD, True, {"phase": "Failed", "reason": "OutOfcpu"}),
    "gone": Row(Cause.INFRASTRUCTURE, POD, True, gone=True),
    # (3) exit code or signal, and what the agent wrote
    "0": Row(None, DONE, said=exits(0)),
    "1": Row(Cause.UNKNOWN, POD, True, crashed(1)),
    "42": Row(Cause.UNKNOWN, POD, True, crashed(42)),
    "64 bad recipe": Row(Cause.USER_ERROR, None, True, crashed(64)),
    "65 bad data": Row(Cause.DATA, None, True, crashed(65)),
    "70 not finite": Row(Cause.NON_FINITE, POD, True, crashed(70)),
    "71 hang": Row(Cause.HANG, POD, True, crashed(71)),
    "74 checkpoint I/O": Row(Cause.INFRASTRUCTURE, POD, True, crashed(74)),
    "75 unasked": Row(Cause.PREEMPTION, POD, True, crashed(75)),
    "75, asked by the API server": Row(Cause.PREEMPTION, POD, False, {**crashed(75), "deletion_at": 2e9}),
    "143, asked by the API server": Row(Cause.PREEMPTION, POD, False, {**crashed(143), "deletion_at": 2e9}),
    "143 of itself": Row(Cause.UNKNOWN, POD, True, crashed(143)),
    "126 not executable": Row(Cause.USER_ERROR, None, True, crashed(126)),
    "127 not found": Row(Cause.USER_ERROR, None, True, crashed(127)),
    "128 cannot start": Row(Cause.USER_ERROR, None, True, crashed(128, "StartError")),
    "134 SIGABRT": Row(Cause.UNKNOWN, POD, True, crashed(134)),
    "137 OOMKilled": Row(Cause.OOM, POD, True, crashed(137, "OOMKilled")),
    "137 not OOMKilled": Row(Cause.UNKNOWN, POD, True, crashed(137)),
    "139 SIGSEGV": Row(Cause.UNKNOWN, POD, True, crashed(139)),
    "termination message": Row(Cause.NON_FINITE, POD, True, crashed(1, message=told(cause="non-finite"))),
    # the same from an agent that lives: its pod stays
    "rank crash": Row(Cause.UNKNOWN, PROCESS, True, said=reported(Cause.UNKNOWN, 1)),
    "rank signal": Row(Cause.UNKNOWN, PROCESS, True, said=exits(0, -9)),
    "rank OOM": Row(Cause.OOM, PROCESS, True, said=reported(Cause.OOM, 1)),
    "rank hang": Row(Cause.HANG, PROCESS, True, said=reported(Cause.HANG, 71)),
    "rank GPU fault": Row(Cause.INFRASTRUCTURE, PROCESS, True, said=reported(Cause.INFRASTRUCTURE, 134)),
    "rank collective timeout": Row(Cause.NETWORK, PROCESS, True, said=reported(Cause.NETWORK, -6, cascade=True)),
    "rank bad recipe": Row(Cause.USER_ERROR, None, True, said=reported(Cause.USER_ERROR, 64)),
    "rank says it was preempted": Row(Cause.PREEMPTION, PROCESS, True, said=reported(Cause.PREEMPTION, 143)),
    "rank of a leaving pod": Row(
        Cause.PREEMPTION, POD, False, {"deletion_at": 2e9}, reported(Cause.PREEMPTION, 143)
    ),
}  # fmt: skip


def struck(row: Row, **spec: Any) -> Scene:
    scene = Scene(**spec).run()
    if row.gone:
        del scene.pods["pod-1-1"]
    if row.pod is not None:
        scene.change_pod("pod-1-1", **row.pod)
    if row.said is not None:
        scene.heard["pod-1-1"] = heard("pod-1-1", 1, at=scene.now, **row.said)
    scene.settle()
    for _ in range(8):
        if scene.status.attempt == 1 and scene.status.phase == Phase.RUNNING:
            scene.now += 10
            scene.settle()
    return scene


@pytest.mark.parametrize("case", TABLE)
def test_the_table_of_causes(case: str) -> None:
    row = TABLE[case]
    scene = struck(row)
    status = scene.status
    if row.cause is None:
        assert (status.phase, status.last_failure) == (Phase.RUNNING, None)
        return
    assert status.last_failure is not None
    assert status.last_failure.cause == row.cause
    if row.action is None:
        assert (status.phase, status.restart_count) == (Phase.FAILED, 0)
        assert row.cause.value in status.explanation
        return
    last = status.restarts.recent[-1]
    assert (last.action, last.charged, last.cause) == (row.action, row.charged, row.cause)
    assert status.restarts.by_cause == {row.cause.value: 1}
    assert (row.cause.value in status.budgets_left) == row.charged


# --- rules of users ---------------------------------------------------------------------------------------------------

ECC = reported(Cause.UNKNOWN, -6, message="rank 1: died", traceback="Traceback\nRuntimeError: uncorrectable ECC error")
RULES = {
    "exit code": (
        {"onExitCodes": [93], "action": "Fail"}, Row(None, None, said=reported(Cause.UNKNOWN, 93)),
        ("Failed", "unknown", None, True),
    ),
    "signal": (
        {"onExitCodes": [134], "cause": "hang"}, Row(None, None, said=reported(Cause.UNKNOWN, -6)),
        ("Recovering", "hang", PROCESS, True),
    ),
    "another exit code": (
        {"onExitCodes": [93], "action": "Fail"}, Row(None, None, said=reported(Cause.UNKNOWN, 94)),
        ("Recovering", "unknown", PROCESS, True),
    ),
    "pattern in the traceback": (
        {"onLogPatterns": ["[Uu]ncorrectable ECC"], "cause": "infrastructure", "action": "ReplacePod"},
        Row(None, None, said=ECC), ("Recovering", "infrastructure", POD, True),
    ),
    "pattern in the message": (
        {"onLogPatterns": ["nothing", "^rank 1: died$"], "action": "RestartGang"},
        Row(None, None, said=ECC), ("Recovering", "unknown", "RestartGang", True),
    ),
    "pod condition": (
        {"onPodConditions": ["DisruptionTarget"], "action": "RestartGang"},
        Row(None, None, pod={"phase": "Failed", "disruption": "EvictionByEvictionAPI"}),
        ("Recovering", "preemption", "RestartGang", False),
    ),
    "all signs must be there": (
        {"onExitCodes": [134], "onLogPatterns": ["something else"], "action": "Fail"},
        Row(None, None, said=ECC), ("Recovering", "unknown", PROCESS, True),
    ),
    "not charged": (
        {"onExitCodes": [134], "countsAgainstBudget": False}, Row(None, None, said=ECC),
        ("Recovering", "unknown", PROCESS, False),
    ),
    "a cause that would end the job is tried again": (
        {"onExitCodes": [65], "action": "RestartProcess"}, Row(None, None, said=reported(Cause.DATA, 65)),
        ("Recovering", "data", PROCESS, True),
    ),
    "a lost pod needs more than the rule asks": (
        {"onExitCodes": [1], "action": "RestartProcess"}, Row(None, None, pod=crashed(1)),
        ("Recovering", "unknown", POD, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules(case: str) -> None:
    rule, row, (phase, cause, action, charged) = RULES[case]
    scene = struck(row, failurePolicy={"rules": [{"name": "mine", **rule}]})
    status = scene.status
    assert status.last_failure is not None
    assert (status.phase, status.last_failure.cause) == (phase, cause)
    fitted = "another" not in case and "all signs" not in case
    assert (status.last_failure.rule == "mine") == fitted
    if action is None:
        assert "rule mine" in status.explanation
    else:
        assert (status.restarts.recent[-1].action, status.restarts.recent[-1].charged) == (action, charged)


def test_the_first_rule_that_fits_counts() -> None:
    rules = [
        {"name": "no", "onExitCodes": [1], "action": "Fail"},
        {"name": "yes", "onExitCodes": [134], "action": "ReplacePod"},
        {"name": "late", "onExitCodes": [134], "action": "Fail"},
    ]
    scene = struck(Row(None, None, said=ECC), failurePolicy={"rules": rules})
    assert scene.status.last_failure is not None
    assert scene.status.last_failure.rule == "yes"


def test_restarts_that_are_not_charged_still_end_without_progress() -> None:
    scene = Scene(failurePolicy={"rules": [{"name": "free", "onExitCodes": [134], "countsAgainstBudget": False}]}).run()
    for attempt in (1, 2, 3):
        scene.hear_all(AgentState.RUNNING)
        scene.settle()
        scene.heard["pod-1-1"] = heard("pod-1-1", attempt, at=scene.now, **ECC)
        scene.settle()
    assert (scene.status.phase, scene.status.attempt) == (Phase.FAILED, 3)
    assert "without a step beyond" in scene.status.explanation


def test_a_pattern_cannot_hold_the_operator_up() -> None:
    """Backtracking engines need 2^30 steps for this."""
    rule = {"name": "evil", "onLogPatterns": ["(a|a)*b", "(a+)+$b"], "action": "Fail"}
    scene = struck(
        Row(None, None, said=reported(Cause.UNKNOWN, 1, message="a" * 2000)), failurePolicy={"rules": [rule]}
    )
    assert scene.status.phase == Phase.RECOVERING


@pytest.mark.parametrize(
    ("rule", "field", "words"),
    [
        ({"onLogPatterns": ["("]}, "onLogPatterns[0]", "RE2"),
        ({"onLogPatterns": ["a", "(?=b)"]}, "onLogPatterns[1]", "RE2"),
        ({}, "rules[0]", "at least one of"),
        ({"onExitCodes": [0]}, "onExitCodes[0]", "greater than"),
        ({"onExitCodes": [1], "action": "Reboot"}, "action", "Fail"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_by_name(rule: dict[str, Any], field: str, words: str) -> None:
    scene = Scene(failurePolicy={"rules": [{"name": "mine", **rule}]})
    problems = check_job(scene.obj).problems
    assert any(field in one.field and words in one.message for one in problems), problems


def test_budgets_are_kept_in_status_and_nothing_but_time_gives_them_back() -> None:
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, at=scene.now, **ECC)
    scene.settle()
    left = {"unknown": {"RestartProcess": 2, "ReplacePod": 5, "RestartGang": 3}}
    assert scene.status.budgets_left == left
    scene.hear_all(AgentState.RUNNING)
    scene.settle()
    scene.heard.clear()  # the operator starts anew
    scene.settle()
    assert scene.status.budgets_left == left
    scene.edit(runPolicy={"suspend": True})
    scene.settle()
    scene.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=75)])
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDED
    assert scene.status.budgets_left == left
    scene.edit(runPolicy={"suspend": False})
    scene.pods.clear()
    scene.settle()
    assert (scene.status.attempt, scene.status.budgets_left) == (3, left)
    scene.create_all()
    scene.now += 21_601
    scene.hear_all(AgentState.RUNNING)
    scene.settle()
    assert scene.status.budgets_left == {}
