"""First-failure attribution across pods and time: the root wins over its consequences, however late it is told."""

from __future__ import annotations

from dataclasses import replace

from operator_cases import Scene, ended, failure, heard
from trireme_api.job import Phase
from trireme_api.protocol import AgentState, Cause, CheckpointRef
from trireme_operator.decide.actions import CreatePod
from trireme_operator.decide.views import Node


def struck_by_a_consequence(**spec: object) -> Scene:
    """Slot 0 has reported a lost peer, nobody else anything; the answer is decided."""
    scene = Scene(**spec).run()
    lost = failure(Cause.NETWORK, rank=0, exit=-6, cascade=True, message="rank 0: NCCL watchdog timeout")
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.EXITED, scene.now, failure=lost)
    scene.settle()
    assert (scene.status.attempt, scene.status.phase) == (2, Phase.RECOVERING)
    assert scene.status.last_failure is not None
    assert (scene.status.last_failure.cause, scene.status.last_failure.cascade) == (Cause.NETWORK, True)
    return scene


def test_a_root_told_late_takes_the_place_of_its_consequence() -> None:
    scene = struck_by_a_consequence()
    root = failure(Cause.HANG, rank=1, exit=71, message="rank 1: hang")
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=root)
    scene.settle()
    found, status = scene.status.last_failure, scene.status
    assert found is not None
    assert (found.cause, found.rank, found.pod, found.node, found.cascade) == (Cause.HANG, 1, "job-1-1", "n1", False)
    assert (status.attempt, status.restart_count, status.restarts.by_cause) == (2, 1, {"hang": 1})
    assert status.restarts.recent[-1].cause == Cause.HANG
    assert set(status.budgets_left) == {"hang"}
    assert scene.notes.count("FailureFound") == 1


def test_a_late_root_that_no_restart_mends_ends_the_job() -> None:
    scene = struck_by_a_consequence()
    root = failure(Cause.USER_ERROR, rank=1, exit=1, message="ModuleNotFoundError")
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=root)
    scene.settle()
    assert scene.status.phase == Phase.FAILED
    assert "ModuleNotFoundError" in scene.status.explanation


def test_a_rule_is_asked_about_the_late_root_too() -> None:
    scene = struck_by_a_consequence(failurePolicy={"rules": [{"name": "no", "onExitCodes": [93], "action": "Fail"}]})
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure(rank=1, exit=93))
    scene.settle()
    assert scene.status.phase == Phase.FAILED
    assert "rule no" in scene.status.explanation


def test_another_consequence_told_late_changes_nothing() -> None:
    scene = struck_by_a_consequence()
    other = failure(Cause.NETWORK, rank=1, exit=-6, cascade=True)
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=other)
    scene.settle()
    assert scene.status.last_failure is not None
    assert (scene.status.last_failure.rank, scene.status.attempt) == (0, 2)


def test_a_pod_killed_for_memory_and_told_last_costs_one_restart() -> None:
    scene = struck_by_a_consequence()
    scene.change_pod("pod-1-1", phase="Failed", ended=ended(137, reason="OOMKilled", finished_at=scene.now))
    scene.settle()
    status = scene.status
    assert status.last_failure is not None
    assert (status.last_failure.cause, status.restarts.by_cause, status.restart_count) == (Cause.OOM, {"oom": 1}, 1)
    assert [slot.incarnation for slot in status.slots] == [1, 3], "replaced in the same recovery"
    assert status.restarts.recent[-1].action == "ReplacePod"


def test_a_node_found_dead_while_its_peers_recover_is_the_same_failure() -> None:
    scene = struck_by_a_consequence()
    scene.nodes = {"n0": Node("n0", True), "n1": Node("n1", False, not_ready_since=scene.now)}
    scene.heard["pod-0-1"] = heard("pod-0-1", 2, AgentState.WAITING, scene.now)
    scene.now += 11
    scene.heard["pod-0-1"] = replace(scene.heard["pod-0-1"], at=scene.now)
    scene.settle()
    status = scene.status
    assert status.last_failure is not None
    assert (status.last_failure.rule, status.last_failure.node) == ("node-lost", "n1")
    assert (status.restart_count, [s.incarnation for s in status.slots]) == (1, [1, 3])


def test_ranks_that_die_one_after_the_other_cost_one_restart() -> None:
    scene = Scene(replicas=3).run()
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.EXITED, scene.now, failure=failure(exit=-9))
    scene.settle()
    for slot in (1, 2):
        scene.now += 10
        scene.change_pod(f"pod-{slot}-1", phase="Failed", ended=ended(139, finished_at=scene.now))
        scene.settle()
    assert (scene.status.restart_count, scene.status.restarts.by_cause) == (1, {"unknown": 1})
    assert [s.incarnation for s in scene.status.slots] == [1, 3, 4]


def test_an_operator_that_has_just_started_counts_no_second_restart_for_a_pod_it_never_heard() -> None:
    scene = struck_by_a_consequence()
    scene.heard.clear()
    scene.change_pod("pod-1-1", phase="Failed", ended=ended(137, reason="OOMKilled", finished_at=scene.now))
    scene.settle()
    assert (scene.status.restart_count, scene.status.restarts.by_cause) == (1, {"oom": 1})


def test_a_pod_made_for_the_new_attempt_that_fails_is_a_new_failure() -> None:
    """Else pods that crash on start would be made for ever."""
    scene = struck_by_a_consequence()
    scene.change_pod("pod-1-1", phase="Failed", ended=ended(1, finished_at=scene.now))
    scene.settle()
    scene.pods.pop("pod-1-1")
    scene.create_all()
    scene.settle()
    scene.heard["pod-1-3"] = heard("pod-1-3", 0, AgentState.WAITING, scene.now)
    scene.change_pod("pod-1-3", phase="Failed", ended=ended(1, finished_at=scene.now))
    scene.settle()
    assert scene.status.restart_count == 2


def test_a_pod_that_had_passed_on_to_the_new_attempt_is_a_new_failure() -> None:
    scene = struck_by_a_consequence()
    scene.heard["pod-1-1"] = heard("pod-1-1", 2, AgentState.WAITING, scene.now)
    scene.settle()
    scene.change_pod("pod-1-1", phase="Failed", ended=ended(1, finished_at=scene.now))
    scene.settle()
    assert (scene.status.restart_count, scene.status.attempt) == (2, 3)


def test_what_is_absorbed_is_written_before_a_pod_is_made() -> None:
    scene = struck_by_a_consequence()
    scene.hear_all(AgentState.EXITED, checkpoint=CheckpointRef(5, "p"))
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now)
    scene.change_pod("pod-1-1", phase="Failed", ended=ended(1, finished_at=scene.now))
    assert scene.decide().actions == ()
    assert [a.slot.incarnation for a in scene.decide().actions if isinstance(a, CreatePod)] == [3]
