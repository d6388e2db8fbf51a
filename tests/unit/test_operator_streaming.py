"""A job that learns from a stream: between two sessions it goes on in place, or waits without nodes."""

from __future__ import annotations

from typing import Any

import pytest
from operator_cases import FITS, Scene
from test_anytime_stream import recipe
from trireme_api.job import ConditionType, Phase
from trireme_api.protocol import AgentState, Cause, CheckpointRef, Failure, RankReport
from trireme_operator.decide.actions import DeletePod
from trireme_operator.decide.conditions import condition
from trireme_operator.observe.desk import Desk
from trireme_operator.observe.store import Store

TEMPLATE = {"resources": {"requests": {"cpu": 1}}}


def scene(arrived: int, **spec: Any) -> Scene:
    return Scene(
        recipe=stream(arrived), template=TEMPLATE, checkpoint={"uri": "pvc://c/d"}, **{"replicas": 2, **spec}
    )


def stream(arrived: int, **changes: Any) -> dict[str, Any]:
    return recipe(anytime={"megaBatches": 4, "arrived": arrived, **changes})


def saved(found: Scene, step: int, *exits: int) -> None:
    """Ranks saved at `step` and ended."""
    ref = CheckpointRef(step, f"step-{step}")
    for slot, code in zip(found.status.slots, exits or (75, 75), strict=True):
        uid = f"pod-{slot.index}-{slot.incarnation}"
        before = dict(found.heard)
        failure = None if code == 75 else Failure(Cause.UNKNOWN, "it broke", rank=slot.index, exit=code)
        found.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=code)], checkpoint=ref, failure=failure)
        found.heard = {**before, uid: found.heard[uid]}
    found.settle()


def true_conditions(found: Scene) -> set[str]:
    return {item.type.value for item in found.status.conditions if item.status == "True"}


def test_nothing_starts_before_the_first_mega_batch() -> None:
    found = scene(0)
    found.settle()
    assert found.status.phase == Phase.WAITING
    assert found.status.slots == []
    assert "trained on 0 of 4 mega-batches" in found.status.explanation
    assert '\'{"spec":{"recipe":{"anytime":{"arrived":1}}}}\'' in found.status.explanation
    found.now += 3600
    found.edit(recipe=stream(1))
    found.settle()
    assert found.status.phase == Phase.STARTING
    assert found.status.stream is not None
    assert found.status.stream.waited_seconds >= 3600
    assert "WaitingForData" not in true_conditions(found)


def test_waits_without_nodes_and_goes_on_when_told() -> None:
    found = scene(1).run()
    saved(found, 10)
    status = found.status
    assert status.phase == Phase.WAITING
    assert (status.slots, status.admitted_spec) == ([], None)
    assert true_conditions(found) == {"WaitingForData"}
    assert {act.name for act in found.decide().actions if isinstance(act, DeletePod)} == {"job-0-1", "job-1-1"}
    assert "trained on 1 of 4 mega-batches at step 10; holds no nodes and waits for mega-batch 2" in status.explanation
    assert status.goodput is not None
    assert status.goodput.state == "waiting"
    assert status.stream is not None
    assert (status.stream.trained, status.stream.needed, status.stream.of) == (1, 2, 4)
    found.pods.clear()
    found.now += 7200
    assert found.decide().status is None, "a job at rest is not written"
    found.edit(recipe=stream(2))
    found.settle()
    status = found.status
    assert (status.phase, status.attempt) == (Phase.STARTING, 2)
    assert status.resume_from is not None
    assert status.resume_from.step == 10
    assert status.goodput is not None
    assert status.goodput.seconds["waiting"] >= 7200
    assert status.stream is not None
    assert (status.stream.told, status.stream.waiting_since) == (2, None)
    assert status.restart_count == 0
    assert {"WaitingForData", "DataArrived"} <= set(found.notes)


def test_data_that_are_there_are_trained_on_in_place() -> None:
    found = scene(2).run()
    slots = found.status.slots
    saved(found, 10)
    status = found.status
    assert (status.phase, status.attempt) == (Phase.STARTING, 2)
    assert [(s.index, s.incarnation) for s in status.slots] == [(s.index, s.incarnation) for s in slots]
    assert status.explanation.startswith("attempt 2:")
    assert status.restart_count == 0
    found.hear_all(AgentState.RUNNING, ranks=[RankReport(0)])
    found.settle()
    assert found.status.phase == Phase.RUNNING


def test_a_pod_that_is_taken_away_at_the_end_of_a_session_is_replaced() -> None:
    found = scene(2).run()
    found.change_pod("pod-1-1", deletion_at=found.now + 30)
    saved(found, 10)
    assert (found.status.phase, found.status.attempt) == (Phase.RECOVERING, 2)
    assert found.status.slots[1].incarnation == 2
    assert found.status.budgets_left == {}


def test_arrival_while_it_trains_counts_at_once_and_is_no_ignored_edit() -> None:
    found = scene(1).run()
    found.edit(recipe=stream(2))
    found.settle()
    ignored = condition(found.status, ConditionType.EDIT_IGNORED)
    assert ignored is None or ignored.status == "False"
    saved(found, 10)
    assert (found.status.phase, found.status.attempt) == (Phase.STARTING, 2)


def test_another_edit_of_the_recipe_is_still_told_as_ignored() -> None:
    """Negative control."""
    found = scene(1).run()
    found.edit(recipe={**stream(2), "seed": 3})
    found.settle()
    ignored = condition(found.status, ConditionType.EDIT_IGNORED)
    assert ignored is not None
    assert "spec.recipe changed" in ignored.message


@pytest.mark.parametrize("step", [5, 9, 11])
def test_saved_within_a_session_is_no_end_of_one(step: int) -> None:
    found = scene(1).run()
    saved(found, step)
    assert found.status.phase != Phase.WAITING
    assert found.status.stream is None or found.status.stream.waiting_since is None


def test_a_failure_at_the_end_of_a_session_is_a_failure() -> None:
    """Whoever starts again finds no new data there, and then the job waits."""
    found = scene(1).run()
    saved(found, 10, 75, 1)
    assert found.status.phase == Phase.RECOVERING
    found.create_all()
    found.hear_all(AgentState.WAITING)
    found.settle()
    saved(found, 10)
    assert found.status.phase == Phase.WAITING
    assert found.status.restart_count == 1


def test_ranks_that_find_nothing_though_told_end_the_job() -> None:
    found = scene(2).run()
    saved(found, 10)
    assert found.status.attempt == 2
    saved(found, 10)
    assert found.status.phase == Phase.FAILED
    assert "spec.recipe.anytime.arrived says 2, but the ranks found no mega-batch 2" in found.status.explanation


def test_data_that_come_while_ranks_look_in_vain_start_another_attempt() -> None:
    found = scene(1).run()
    saved(found, 10, 75, 1)
    found.edit(recipe=stream(2))
    found.create_all()
    found.settle()
    saved(found, 10)
    assert (found.status.phase, found.status.attempt) == (Phase.STARTING, 3)


def test_suspended_while_it_waits() -> None:
    found = scene(1).run()
    saved(found, 10)
    found.pods.clear()
    found.now += 100
    found.edit(runPolicy={"suspend": True})
    found.settle()
    assert found.status.phase == Phase.SUSPENDED
    assert "WaitingForData" not in true_conditions(found)
    found.now += 1000
    found.edit(runPolicy={"suspend": False})
    found.settle()
    assert found.status.phase == Phase.WAITING
    assert "Suspended" not in true_conditions(found)
    found.now += 100
    found.edit(recipe=stream(4))
    found.settle()
    assert found.status.phase == Phase.STARTING
    assert found.status.stream is not None
    assert 200 <= found.status.stream.waited_seconds < 300
    assert 1000 <= found.status.suspended_seconds < 1100


def test_the_active_deadline_stands_still_while_it_waits() -> None:
    found = scene(1, runPolicy={"activeDeadlineSeconds": 600}).run()
    saved(found, 10)
    found.pods.clear()
    found.now += 10_000
    found.settle()
    assert found.status.phase == Phase.WAITING
    found.edit(recipe=stream(2))
    found.settle()
    assert found.status.phase == Phase.STARTING
    found.now += 700
    found.settle()
    assert found.status.phase == Phase.FAILED, "the deadline itself still counts"


def test_waiting_for_several_at_a_time() -> None:
    found = scene(2)
    found.edit(recipe=stream(2, waitFor=2))
    found.run()
    saved(found, 20)
    found.pods.clear()
    assert "waits for mega-batch 3 to 4" in found.status.explanation
    found.edit(recipe=stream(3, waitFor=2))
    found.settle()
    assert found.status.phase == Phase.WAITING
    found.edit(recipe=stream(4, waitFor=2))
    found.settle()
    assert found.status.phase == Phase.STARTING


def test_the_last_session_ends_the_job() -> None:
    found = scene(4).run()
    found.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=0)], checkpoint=CheckpointRef(40, "step-40"))
    found.settle()
    assert found.status.phase == Phase.SUCCEEDED


def test_a_job_without_data_holds_no_room_back_from_others() -> None:
    for arrived, asks in ((0, False), (1, True)):
        found = scene(arrived)
        store = Store()
        store.put_job(found.obj)
        assert Desk(store)._waits(found.job) is asks


def test_no_admission_no_start() -> None:
    found = scene(0)
    found.admission = None
    found.settle()
    assert found.status.phase == Phase.WAITING
    found.edit(recipe=stream(1))
    found.settle()
    assert found.status.phase == Phase.PENDING
    found.admission = FITS
    found.settle()
    assert found.status.phase == Phase.STARTING
