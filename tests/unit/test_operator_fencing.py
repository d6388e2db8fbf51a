"""Zombies: a pod whose slot has passed on to another does no harm, whatever it says and whenever it wakes up."""

from __future__ import annotations

from typing import Any

import pytest
from operator_cases import Scene, failure, heard
from trireme_api.job import Phase
from trireme_api.protocol import Action, AgentState, Cause, CheckpointRef, EnergyReading, Progress, RankReport
from trireme_operator.decide.actions import DeletePod
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.gang import places
from trireme_operator.decide.views import Node


def crew(scene: Scene) -> Crew:
    return Crew(scene.job, places(scene.job, scene.seen()))


@pytest.fixture
def scene() -> Scene:
    """Node n1 is dead, its pod has a successor, the gang runs again; then the node comes back."""
    scene = Scene().run()
    scene.nodes = {name: Node(name, True) for name in ("n0", "n2")}
    scene.nodes["n1"] = Node("n1", False, not_ready_since=scene.now)
    scene.now += 11
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING, scene.now)
    scene.settle()
    scene.create_all()
    scene.change_pod("pod-1-2", node="n2")
    scene.hear_all(AgentState.RUNNING, checkpoint=CheckpointRef(10, "step-10"))
    scene.settle()
    assert (scene.status.phase, scene.status.attempt, scene.status.slots[1].incarnation) == (Phase.RUNNING, 2, 2)
    scene.nodes["n1"] = Node("n1", True)
    return scene


SAYINGS: dict[str, dict[str, Any]] = {
    "it runs": {"state": AgentState.RUNNING, "progress": Progress(999)},
    "it has committed": {"state": AgentState.RUNNING, "checkpoint": CheckpointRef(999, "step-999")},
    "it failed": {"state": AgentState.EXITED, "failure": failure(Cause.USER_ERROR, exit=64)},
    "it is done": {"state": AgentState.EXITED, "ranks": [RankReport(0, exit=0)]},
    "it waits": {"state": AgentState.WAITING},
}


@pytest.mark.parametrize("attempt", [1, 2, 3])
@pytest.mark.parametrize("saying", SAYINGS)
def test_a_zombie_is_told_to_stop_and_believed_in_nothing(scene: Scene, saying: str, attempt: int) -> None:
    before = scene.status
    scene.heard["pod-1-1"] = heard("pod-1-1", attempt, at=scene.now, **SAYINGS[saying])
    told = crew(scene).assignment("pod-1-1")
    assert (told.action, told.attempt) == (Action.STOP, 2)
    actions = [action for decision in scene.settle() for action in decision.actions]
    assert {a.uid for a in actions if isinstance(a, DeletePod)} == {"pod-1-1"}
    after = scene.status
    assert (after.phase, after.attempt, after.slots, after.last_checkpoint, after.progress, after.restarts) == (
        before.phase, before.attempt, before.slots, before.last_checkpoint, before.progress, before.restarts,
    )  # fmt: skip


def test_the_energy_a_zombie_has_burnt_is_counted_all_the_same(scene: Scene) -> None:
    reading = {"cpu": EnergyReading(500.0, "declared")}
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.RUNNING, scene.now, energy=reading)
    scene.now += 10
    scene.settle()
    assert scene.status.energy.joules >= 500.0


def test_others_run_on_while_a_zombie_reports(scene: Scene) -> None:
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.RUNNING, scene.now)
    for uid in ("pod-0-1", "pod-1-2"):
        assert crew(scene).assignment(uid).action == Action.RUN


def test_a_member_that_missed_the_new_attempt_runs_nothing_before_it_holds_it() -> None:
    """Paused while its gang began again: what it is told is the new attempt, and hold."""
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure())
    scene.settle()
    scene.heard["pod-1-1"] = heard("pod-1-1", 2, AgentState.WAITING, scene.now)
    told = crew(scene).assignment("pod-0-1")
    assert (told.attempt, told.action) == (2, Action.HOLD)
    scene.heard["pod-0-1"] = heard("pod-0-1", 2, AgentState.WAITING, scene.now)
    assert crew(scene).assignment("pod-0-1").action == Action.RUN


def test_a_pod_of_a_deleted_and_recreated_job_is_no_member() -> None:
    scene = Scene().run()
    scene.obj["metadata"] = {**scene.obj["metadata"], "uid": "another"}
    scene.pods = {uid: one for uid, one in scene.pods.items() if one.owner_uid == "another"}
    assert crew(scene).assignment("pod-0-1").action == Action.STOP
