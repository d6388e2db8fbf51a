"""Figures in status: progress, time left, checkpoints; and the crew's assignments with the barrier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import NOW, Scene, heard
from trireme_api.job import ConditionType, Phase, TrainingJobStatus
from trireme_api.protocol import AgentState, CheckpointRef, Progress
from trireme_operator.decide.accounting import best_step
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.clock import duration, seconds, stamp
from trireme_operator.decide.conditions import condition, enter
from trireme_operator.decide.gang import places


def test_progress_is_rank_zeros_and_the_furthest_step_is_kept() -> None:
    scene = Scene().run()
    progress = Progress(50, total_steps=100, tokens=5000, loss=3.14159265, tokens_per_second=20.0, mfu=None)
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.RUNNING, scene.now, progress=Progress(99))
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING, scene.now, progress=progress)
    scene.settle()
    found = scene.status.progress
    assert found is not None
    assert (found.step, found.total_steps, found.loss, found.mfu) == (50, 100, 3.1416, None)
    assert found.remaining == "4m10s", "50 steps of 100 tokens at 20 a second"
    scene.now += 60
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING, scene.now, progress=Progress(40))
    scene.settle()
    assert scene.status.progress is not None
    assert (scene.status.progress.step, scene.status.progress.best_step, best_step(scene.status)) == (40, 50, 50)


def test_the_newest_checkpoint_is_kept_and_resumed_from() -> None:
    scene = Scene().run()
    scene.hear_all(AgentState.RUNNING, checkpoint=CheckpointRef(40, "step-40"))
    scene.settle()
    scene.now += 60
    scene.hear_all(AgentState.RUNNING, checkpoint=CheckpointRef(20, "step-20"))
    scene.settle()
    del scene.pods["pod-0-1"]
    scene.settle()
    assert scene.status.last_checkpoint is not None
    assert scene.status.last_checkpoint.step == 40
    assert scene.status.resume_from is not None
    assert scene.status.resume_from.path == "step-40"


@pytest.mark.parametrize(
    ("length", "text"), [(0, "0s"), (59.6, "1m00s"), (190, "3m10s"), (18120, "5h02m"), (1e6, "11d13h"), (-5, "0s")]
)
def test_durations(length: float, text: str) -> None:
    assert duration(length) == text


@given(st.floats(min_value=0, max_value=4e9))
def test_times_survive_the_text(now: float) -> None:
    assert seconds(stamp(now)) == pytest.approx(now, abs=0.001)


def test_what_is_no_time() -> None:
    assert seconds("soon") is None
    assert seconds(None) is None


# --- conditions -----------------------------------------------------------------------------------------------------


def test_a_transition_time_moves_only_with_the_truth() -> None:
    status = TrainingJobStatus()
    enter(status, Phase.PENDING, "WaitsForRoom", "a", NOW, 1)
    enter(status, Phase.PENDING, "Queued", "b", NOW + 10, 2)
    found = condition(status, ConditionType.ADMITTED)
    assert found is not None
    assert (found.last_transition_time, found.reason, found.message) == (stamp(NOW), "Queued", "b")
    assert found.observed_generation == 2
    enter(status, Phase.STARTING, "Admitted", "c", NOW + 20, 2)
    found = condition(status, ConditionType.ADMITTED)
    assert found is not None
    assert (found.status, found.last_transition_time) == ("True", stamp(NOW + 20))


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_has_conditions_that_agree_with_it(phase: Phase) -> None:
    status = TrainingJobStatus()
    for before in Phase:
        enter(status, before, "Before", "", NOW, 1)
    enter(status, phase, "Reason", "message", NOW, 1)
    running = condition(status, ConditionType.RUNNING)
    assert running is not None
    assert (running.status == "True") == (phase == Phase.RUNNING)
    assert status.explanation == "message"
    kinds = [item.type for item in status.conditions]
    assert len(kinds) == len(set(kinds))


# --- assignments ----------------------------------------------------------------------------------------------------


def crew(scene: Scene) -> Crew:
    return Crew(scene.job, places(scene.job, scene.seen()))


def told(scene: Scene) -> list[str]:
    return [crew(scene).assignment(uid).action.value for uid in ("pod-0-1", "pod-1-1")]


def test_the_barrier_lifts_when_every_pod_holds_the_attempt() -> None:
    scene = Scene()
    scene.settle()
    scene.create_all()
    assert told(scene) == ["hold", "hold"]
    scene.hear_all(AgentState.WAITING)
    assert told(scene) == ["hold", "hold"], "their pods are not written down yet"
    scene.settle()
    assert told(scene) == ["run", "run"]
    scene.heard["pod-1-1"] = heard("pod-1-1", 0, AgentState.WAITING)
    assert told(scene) == ["hold", "hold"]
    del scene.heard["pod-1-1"]
    assert told(scene) == ["hold", "hold"]
    first = crew(scene).assignment("pod-1-1")
    assert (first.node_rank, first.world_size, first.master_address, first.master_port) == (1, 2, "10.0.0.1", 29401)


def test_no_address_no_start() -> None:
    scene = Scene()
    scene.settle()
    scene.create_all()
    scene.change_pod("pod-0-1", ip="")
    scene.settle()
    scene.hear_all(AgentState.WAITING)
    assert told(scene) == ["hold", "hold"]


def test_an_operator_that_just_started_disturbs_nobody() -> None:
    scene = Scene().run()
    scene.heard.clear()
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING)
    assert told(scene) == ["run", "run"]


def test_a_new_attempt_is_a_new_barrier() -> None:
    scene = Scene().run()
    del scene.pods["pod-1-1"]
    scene.settle()
    assert crew(scene).assignment("pod-0-1").action.value == "hold"
    assert crew(scene).assignment("pod-0-1").attempt == 2
    assert crew(scene).assignment("pod-1-1").action.value == "stop", "its slot has been given away"


@pytest.mark.parametrize(
    ("edit", "action"),
    [({"runPolicy": {"suspend": True}}, "save-and-stop"), ({"runPolicy": {"activeDeadlineSeconds": 1}}, "stop")],
)
def test_agents_are_told_of_the_end(edit: dict[str, object], action: str) -> None:
    scene = Scene().run()
    scene.edit(**edit)
    scene.settle()
    assert told(scene) == [action, action]


def test_equal_crews_have_equal_keys_and_tags() -> None:
    scene = Scene().run()
    before = crew(scene)
    scene.hear_all(AgentState.RUNNING, progress=Progress(7))
    after = crew(scene)
    assert before.key == after.key
    assert before.assignment("pod-0-1").tag == after.assignment("pod-0-1").tag
