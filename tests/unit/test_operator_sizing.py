"""The size of a gang: the arithmetic, and a job's way through losses, growth and scaling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import Scene, failure, heard, manifest
from trireme_api.job import ConditionType, Phase, Slot
from trireme_api.protocol import Action, AgentState, Assignment, CheckpointRef, RankReport
from trireme_api.replicas import Replicas
from trireme_operator.decide import sizing
from trireme_operator.decide.actions import CreatePod, DeletePod
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.conditions import condition
from trireme_operator.decide.gang import places
from trireme_operator.decide.views import Node, Verdict, job_of

E = {"desired": 4, "min": 2}
STEPS = {"desired": 4, "allowed": (2, 4)}


@pytest.mark.parametrize(
    ("replicas", "nodes", "size"),
    [
        ({"desired": 4}, 9, 4),
        ({"desired": 4}, 3, None),
        (E, 9, 4),
        (E, 3, 3),
        (E, 1, None),
        (STEPS, 3, 2),
        (STEPS, 1, None),
        ({"desired": 4, "min": 3, "allowed": (2, 4)}, 3, None),
        ({"desired": 4, "allowed": (2, 4, 8)}, 8, 4),
    ],
)
def test_the_largest_permitted_size(replicas: dict[str, int], nodes: int, size: int | None) -> None:
    assert Replicas(**replicas).fit(nodes) == size


@pytest.mark.parametrize(
    ("replicas", "ranked", "spares", "room", "more"),
    [
        ({"desired": 4}, 4, 0, 9, 0),
        ({"desired": 4, "spares": 2}, 4, 0, 9, 2),
        ({"desired": 4, "spares": 2}, 4, 1, 9, 1),
        ({"desired": 4, "spares": 2}, 4, 0, 1, 1),
        (E, 2, 0, 9, 2),
        (E, 2, 0, 1, 1),
        (STEPS, 2, 0, 1, 0),  # one more would only idle
        (STEPS, 2, 1, 1, 1),
        (STEPS, 2, 0, 2, 2),
        ({**STEPS, "spares": 1}, 2, 0, 3, 3),
    ],
)
def test_only_pods_that_are_of_use_are_added(
    replicas: dict[str, int], ranked: int, spares: int, room: int, more: int
) -> None:
    assert sizing.extra(Replicas(**replicas), ranked, spares, room) == more


@pytest.mark.parametrize(("room", "pods"), [(9, 5), (5, 5), (4, 4), (3, 3), (2, 2), (1, None)])
def test_a_job_starts_with_what_fits(room: int, pods: int | None) -> None:
    assert sizing.admissible(Replicas(**E, spares=1), room) == pods


def slots(ranked: int, spares: int = 0) -> list[Slot]:
    return [Slot(index=i, incarnation=1, pod_uid=f"u{i}", spare=i >= ranked) for i in range(ranked + spares)]


@given(
    ranked=st.integers(1, 6), spares=st.integers(0, 3), size=st.integers(1, 8), lost=st.sets(st.integers(0, 8)),
    renewed=st.sets(st.integers(0, 8)), unready=st.sets(st.integers(0, 8)),
)  # fmt: skip
def test_no_cast_loses_or_doubles_a_slot(
    ranked: int, spares: int, size: int, lost: set[int], renewed: set[int], unready: set[int]
) -> None:
    before = slots(ranked, spares)
    ready = [slot.index for slot in before if slot.spare and slot.index not in unready]
    again = sizing.recast(before, 2, stricken=lost, renewed=renewed, ready=ready)
    assert again.size == ranked
    smaller = sizing.resized(before, size, usable={s.index for s in before} - lost, ready=ready)
    usable = len([s for s in before if not s.spare and s.index not in lost]) + len(ready)
    assert (smaller is None) == (usable < size)
    for cast in (again, *([smaller] if smaller else [])):
        indices = [slot.index for slot in cast.slots]
        assert len(set(indices)) == len(indices)
        flags = [slot.spare for slot in cast.slots]
        assert flags == sorted(flags), "spares come last, for the order of the others is that of the node ranks"
        for slot in cast.slots:
            if not slot.spare and slot.index in unready and before[slot.index].spare:
                pytest.fail("a spare that is not ready has ranks")
    if smaller is not None:
        assert smaller.size == size
        assert not any(not slot.spare and slot.index in lost for slot in smaller.slots if not before[slot.index].spare)


def test_a_spare_takes_the_very_rank_of_the_lost_slot() -> None:
    cast = sizing.recast(slots(3, 1), 2, stricken={1}, renewed=(), ready=[3])
    assert [(s.index, s.spare) for s in cast.slots] == [(0, False), (3, False), (2, False)]


@pytest.mark.parametrize(
    ("replicas", "field"),
    [
        ({"desired": 2, "min": 3}, "min"),
        ({"desired": 4, "max": 3}, "max"),
        ({"desired": 3, "allowed": [2, 4]}, "allowed"),
    ],
)
def test_contradictions_are_named(replicas: dict[str, object], field: str) -> None:
    obj = manifest()
    obj["spec"]["replicas"] = replicas
    assert field in str(job_of(obj).problems[0])


def test_a_size_with_more_ranks_than_sequences_is_refused() -> None:
    recipe = {
        "model": {"preset": "opt-8m"}, "batch": {"tokens": 512}, "until": {"steps": 1},
        "data": {"sources": [{"path": "pvc://work/data"}], "sequenceLength": 128},
    }  # fmt: skip
    obj = manifest(recipe=recipe, checkpoint={"uri": "pvc://work/out"}, template={}, procsPerNode=2)
    obj["spec"]["replicas"] = {"desired": 2, "max": 3}
    problem = next(p for p in job_of(obj).problems if p.field == "spec.replicas.max")
    assert "3 nodes are 6 ranks" in problem.message
    assert "at most 2 nodes" in problem.message


# --- a job's way ----------------------------------------------------------------------------------------------------


def told(scene: Scene) -> list[Assignment]:
    """What each slot's pod is told, by slot order."""
    crew = Crew(scene.job, places(scene.job, scene.seen()))
    return [crew.assignment(slot.pod_uid or "") for slot in scene.status.slots]


def shape(scene: Scene) -> list[tuple[int, int, bool]]:
    return [(slot.index, slot.incarnation, slot.spare) for slot in scene.status.slots]


def hear(scene: Scene) -> None:
    """Agents do as they are told: ranks run, spares wait."""
    for slot in scene.status.slots:
        state = AgentState.WAITING if slot.spare else AgentState.RUNNING
        uid = f"pod-{slot.index}-{slot.incarnation}"
        if uid in scene.pods:
            known = {"ranks": [RankReport(0)], "checkpoint": CheckpointRef(10, "step-10")}
            scene.heard[uid] = heard(uid, scene.status.attempt, state, scene.now, **known)


def started(desired: int, **replicas: object) -> Scene:
    scene = Scene()
    scene.obj["spec"]["replicas"] = {"desired": desired, **replicas}
    scene.admission = Verdict(True, "Fits", "", desired + int(str(replicas.get("spares", 0))))
    scene.settle()
    scene.admission = Verdict(False, "Room", "", 0)
    return to_running(scene)


def to_running(scene: Scene) -> Scene:
    scene.create_all()
    scene.settle()
    hear(scene)
    scene.settle()
    assert scene.status.phase == Phase.RUNNING, scene.status.explanation
    scene.now += 10
    hear(scene)
    return scene


def all_saved(scene: Scene) -> None:
    for slot in scene.status.slots:
        if not slot.spare:
            uid = f"pod-{slot.index}-{slot.incarnation}"
            scene.heard[uid] = heard(
                uid, scene.status.attempt, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=75)],
                checkpoint=CheckpointRef(20, "step-20"),
            )  # fmt: skip


def test_spares_are_made_and_held_without_ranks() -> None:
    scene = started(2, spares=1)
    assert shape(scene) == [(0, 1, False), (1, 1, False), (2, 1, True)]
    assert [(a.action, a.node_rank, a.spare) for a in told(scene)] == [
        (Action.RUN, 0, False), (Action.RUN, 1, False), (Action.HOLD, 2, True),
    ]  # fmt: skip
    assert {a.world_size for a in told(scene)} == {2}
    scene.settle()
    replicas = scene.status.replicas
    assert (replicas.size, replicas.ready, replicas.spares, scene.status.node_summary) == (2, 2, 1, "2/2")


def test_a_lost_pod_is_replaced_by_a_spare_and_charged_once() -> None:
    scene = started(2, spares=1)
    del scene.pods["pod-0-1"]
    scene.settle()
    assert shape(scene) == [(2, 1, False), (1, 1, False)]
    assert (scene.status.attempt, scene.status.restart_count) == (2, 1)
    assert "SpareUsed" in scene.notes
    for uid in ("pod-2-1", "pod-1-1"):
        scene.heard[uid] = heard(uid, 2, AgentState.WAITING, scene.now)
    assert [(a.action, a.node_rank) for a in told(scene)] == [(Action.RUN, 0), (Action.RUN, 1)]


def test_a_spare_that_dies_costs_nothing_and_is_replaced_where_there_is_room() -> None:
    scene = started(2, spares=1)
    del scene.pods["pod-2-1"]
    scene.settle()
    assert shape(scene) == [(0, 1, False), (1, 1, False)]
    scene.admission = Verdict(True, "Room", "", 1)
    scene.settle()
    assert shape(scene) == [(0, 1, False), (1, 1, False), (2, 1, True)]
    assert (scene.status.attempt, scene.status.restart_count) == (1, 0)
    assert [a for a in scene.decide().actions if isinstance(a, CreatePod)] == [CreatePod(scene.status.slots[2])]


def test_a_spare_on_a_cordoned_node_goes_before_it_is_needed() -> None:
    """Else it would take a lost pod's place only to leave again: two restarts for one failure."""
    scene = started(2, spares=1)
    room = {"cpu": 4.0, "pods": 10.0}
    scene.nodes = {f"n{i}": Node(f"n{i}", True, allocatable=room, unschedulable=i == 2) for i in range(3)}
    actions = [action for decision in scene.settle() for action in decision.actions]
    assert actions[0] == DeletePod("job-2-1", "pod-2-1", None)
    scene.change_pod("pod-2-1", deletion_at=scene.now + 60)
    scene.settle()
    assert shape(scene) == [(0, 1, False), (1, 1, False)]
    assert (scene.status.attempt, scene.status.phase) == (1, Phase.RUNNING), "the gang is not disturbed"


def lose_a_node(scene: Scene) -> None:
    """Node 1 dies, and no other takes the new pod."""
    scene.nodes = {f"n{i}": Node(f"n{i}", ready=i != 1, not_ready_since=scene.now - 60) for i in range(4)}
    scene.heard["pod-1-1"] = heard("pod-1-1", scene.status.attempt, AgentState.RUNNING, scene.now - 60)


def test_without_spare_and_room_the_gang_shrinks_and_says_so() -> None:
    scene = started(3, min=2)
    lose_a_node(scene)
    scene.settle()
    assert (scene.status.phase, scene.status.attempt, len(scene.status.slots)) == (Phase.RECOVERING, 2, 3)
    scene.now += scene.limits.shrink_seconds
    scene.settle()
    assert (scene.status.attempt, scene.status.restart_count) == (3, 1), "the loss is charged, the shrinking is not"
    assert shape(scene) == [(0, 1, False), (2, 1, False)]
    assert next(a for d in scene.settle() for a in d.actions if isinstance(a, DeletePod)).name == "job-1-1"
    del scene.pods["pod-1-1"]
    to_running(scene)
    scene.settle()
    found = condition(scene.status, ConditionType.SHRUNK)
    assert found is not None
    assert found.status == "True"
    assert "2 of 3 nodes: 1 of 3 pods found no node" in found.message
    assert scene.status.node_summary == "2/3"
    assert [a.node_rank for a in told(scene)] == [0, 1]


def test_a_gang_that_may_not_shrink_waits() -> None:
    scene = started(3)
    lose_a_node(scene)
    scene.settle()
    scene.now += scene.limits.shrink_seconds + 1
    scene.settle()
    assert (scene.status.attempt, len(scene.status.slots)) == (2, 3)
    scene.now += scene.limits.gang_seconds
    scene.settle()
    assert scene.status.phase == Phase.PENDING


def shrunk() -> Scene:
    scene = started(3, min=2)
    lose_a_node(scene)
    scene.settle()
    scene.now += scene.limits.shrink_seconds
    scene.settle()
    del scene.pods["pod-1-1"]
    return to_running(scene)


def test_it_grows_back_after_a_pause_by_spares_that_are_ready_first() -> None:
    scene = shrunk()
    scene.admission = Verdict(True, "Room", "", 1)
    scene.settle()
    assert len(scene.status.slots) == 2, "not at once: the node may flap"
    scene.now += scene.limits.snooze_seconds
    hear(scene)
    scene.settle()
    assert shape(scene) == [(0, 1, False), (2, 1, False), (1, 3, True)]
    assert scene.status.attempt == 3, "nobody is disturbed yet"
    scene.nodes = None
    scene.admission = Verdict(False, "Room", "", 0)
    scene.create_all()
    scene.settle()
    assert scene.status.sizing.target is None
    hear(scene)
    scene.settle()
    assert (scene.status.sizing.target, scene.status.phase, scene.status.attempt) == (3, Phase.RUNNING, 3)
    assert [a.action for a in told(scene)] == [Action.SAVE_AND_HOLD, Action.SAVE_AND_HOLD, Action.HOLD]
    all_saved(scene)
    scene.settle()
    assert (scene.status.attempt, scene.status.restart_count) == (4, 1)
    assert shape(scene) == [(0, 1, False), (2, 1, False), (1, 3, False)]
    assert scene.status.resume_from is not None
    assert scene.status.resume_from.step == 20, "continued from the step that was saved for it"
    to_running(scene)
    scene.settle()
    found = condition(scene.status, ConditionType.SHRUNK)
    assert found is not None
    assert found.status == "False"


def test_each_further_shrink_waits_longer_before_it_grows() -> None:
    assert [sizing.snooze(n, 60.0) for n in (1, 2, 3, 99)] == [60.0, 120.0, 240.0, 3600.0]


def test_growth_that_finds_no_place_disturbs_nobody_and_is_tried_again_later() -> None:
    scene = shrunk()
    scene.now += scene.limits.snooze_seconds
    hear(scene)
    scene.admission = Verdict(True, "Room", "", 1)
    scene.settle()
    assert len(scene.status.slots) == 3
    scene.now += scene.limits.gang_seconds
    hear(scene)
    scene.settle()
    assert len(scene.status.slots) == 2
    assert scene.status.attempt == 3
    assert scene.status.sizing.not_before is not None
    assert "NoRoom" in scene.notes


def test_scaling_down_saves_and_drops_the_last_ranks() -> None:
    scene = started(3)
    scene.edit(replicas={"desired": 2})
    scene.settle()
    assert scene.status.sizing.target == 2
    assert {a.action for a in told(scene)} == {Action.SAVE_AND_HOLD}
    all_saved(scene)
    scene.settle()
    assert shape(scene) == [(0, 1, False), (1, 1, False)]
    assert (scene.status.attempt, scene.status.restart_count) == (2, 0)
    assert scene.status.admitted_spec is not None
    assert scene.status.admitted_spec["replicas"]["desired"] == 2
    assert condition(scene.status, ConditionType.EDIT_IGNORED) is None


def test_scaling_up_is_honoured_when_there_is_room_even_without_checkpoints() -> None:
    scene = Scene(replicas=2).run()
    scene.edit(replicas={"desired": 3})
    scene.admission = Verdict(True, "Room", "", 1)
    scene.settle()
    assert shape(scene)[-1] == (2, 1, True)
    scene.create_all()
    scene.settle()
    hear(scene)
    scene.settle()
    assert scene.status.sizing.target == 3


def test_without_checkpoints_it_does_not_grow_by_itself() -> None:
    scene = Scene()
    scene.obj["spec"]["replicas"] = {"desired": 3, "min": 2}
    scene.admission = Verdict(True, "Fits", "", 2)
    scene.run()
    assert (len(scene.status.slots), scene.status.node_summary) == (2, "2/3")
    scene.admission = Verdict(True, "Room", "", 1)
    scene.settle()
    assert len(scene.status.slots) == 2


def test_ranks_that_do_not_save_in_time_are_not_waited_for_for_ever() -> None:
    scene = started(3)
    scene.edit(replicas={"desired": 2})
    scene.settle()
    scene.now += 1000
    hear(scene)
    scene.settle()
    assert (scene.status.attempt, len(scene.status.slots)) == (2, 2)
    assert "did not save in time" in scene.status.sizing.reason


def test_a_real_failure_while_saving_is_a_failure() -> None:
    scene = started(3)
    scene.edit(replicas={"desired": 2})
    scene.settle()
    uid = "pod-1-1"
    known = {"failure": failure(exit=1), "ranks": [RankReport(0, exit=1)]}
    scene.heard[uid] = heard(uid, 1, AgentState.EXITED, scene.now, **known)
    scene.settle()
    assert scene.status.restart_count == 1
    assert scene.status.sizing.target is None


def test_suspending_goes_before_resizing() -> None:
    scene = started(3, spares=1)
    scene.edit(replicas={"desired": 2})
    scene.settle()
    scene.edit(replicas={"desired": 2}, runPolicy={"suspend": True})
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDING
    assert {a.action for a in told(scene)} == {Action.SAVE_AND_STOP}


def test_spares_leave_when_the_job_is_done() -> None:
    scene = started(2, spares=1)
    for uid in ("pod-0-1", "pod-1-1"):
        scene.heard[uid] = heard(uid, 1, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=0)])
    deleted = [a.name for d in scene.settle() for a in d.actions if isinstance(a, DeletePod)]
    assert scene.status.phase == Phase.SUCCEEDED
    assert set(deleted) == {"job-2-1"}


def test_a_status_of_an_older_operator_has_no_spares() -> None:
    assert Slot.model_validate({"index": 1, "incarnation": 1}).spare is False
