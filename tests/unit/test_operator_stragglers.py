"""Slow ranks are reported with pod and node, once, and left alone."""

from __future__ import annotations

import random

import pytest
from operator_cases import Scene, heard
from trireme_api.protocol import AgentState, RankReport
from trireme_trainer.telemetry.pace import Pace


def told(scene: Scene, *own: float | None, step: float = 1.0) -> Scene:
    """One rank per pod tells its own time for a step."""
    for slot, seconds in enumerate(own):
        uid = f"pod-{slot}-1"
        rank = RankReport(0, 7, None, 40, "step", 0.1, step_seconds=step, own_seconds=seconds)
        scene.heard[uid] = heard(uid, scene.status.attempt, AgentState.RUNNING, scene.now, ranks=[rank])
    scene.now += 1
    scene.decide()
    return scene


def gang(nodes: int = 4) -> Scene:
    return Scene(name="job", replicas=nodes).run()


def test_a_slow_rank_is_named_once_with_its_pod_and_node() -> None:
    scene = told(gang(), 0.5, 0.5, 0.5, 0.9)
    found = scene.status.stragglers
    assert [(one.rank, one.pod, one.node, one.own_seconds, one.others_seconds) for one in found] == [
        (3, "job-3-1", "n3", 0.9, 0.5)
    ]
    told(scene, 0.5, 0.5, 0.5, 0.95)
    told(scene, 0.5, 0.5, 0.5, 0.66)
    assert scene.status.stragglers == found, "still slow: the report stays as it was made"
    assert scene.notes.count("Straggler") == 1
    assert (scene.status.phase, scene.status.attempt) == ("Running", 1)
    told(scene, 0.5, 0.5, 0.5, 0.6)
    assert scene.status.stragglers == []


def test_what_costs_the_gang_nothing_is_no_straggler() -> None:
    assert told(gang(), 0.01, 0.01, 0.01, 0.05, step=1.0).status.stragglers == []
    assert told(gang(), 0.5, 0.5, 0.5, 0.7).status.stragglers == []


def test_who_costs_about_as_much_as_counts_does_not_come_and_go() -> None:
    scene = told(gang(), 0.1, 0.1, 0.1, 0.21)
    assert [one.rank for one in scene.status.stragglers] == [3]
    for own in (0.19, 0.21, 0.18, 0.22, 0.16):
        assert len(told(scene, 0.1, 0.1, 0.1, own).status.stragglers) == 1
    assert scene.notes.count("Straggler") == 1
    assert told(scene, 0.1, 0.1, 0.1, 0.14).status.stragglers == []


def test_of_two_ranks_the_slower_is_named() -> None:
    assert [one.rank for one in told(gang(2), 0.9, 0.4).status.stragglers] == [0]


def test_a_rank_alone_and_ranks_that_tell_nothing_have_nobody_to_be_compared_with() -> None:
    assert told(gang(1), 5.0).status.stragglers == []
    assert told(gang(3), 5.0, None, None).status.stragglers == []


def sampled(step: float, *phases: tuple[int, list[float]]) -> Scene:
    """Ranks that for so many seconds work so much of each step, looked at ten times a second as the trainer does."""
    chance, paces, scene, done = random.Random(7), [Pace() for _ in phases[0][1]], gang(len(phases[0][1])), 0.0
    for seconds, own in phases:
        for _ in range(seconds):
            for _ in range(10):
                done += 0.1 / step
                means = [
                    pace.look(0.1, waits=chance.random() > worked / step, step=int(done))
                    for pace, worked in zip(paces, own, strict=True)
                ]
            told(scene, *means, step=step)
    return scene


@pytest.mark.parametrize("step", [0.05, 1.0])
def test_ranks_alike_are_never_reported_for_being_sampled(step: float) -> None:
    assert sampled(step, (900, [step / 3] * 4)).notes.count("Straggler") == 0


@pytest.mark.parametrize("step", [0.05, 1.0])
def test_a_slow_rank_is_named_within_half_a_minute(step: float) -> None:
    from_the_start = sampled(step, (30, [step / 3] * 3 + [step * 2 / 3]))
    assert [one.rank for one in from_the_start.status.stragglers] == [3]
    later = sampled(step, (60, [step / 4] * 4), (15, [step / 4] * 3 + [step * 3 / 4]))
    assert [one.rank for one in later.status.stragglers] == [3]


def test_a_restarted_operator_reports_nobody_twice() -> None:
    scene = told(gang(), 0.5, 0.5, 0.5, 0.9)
    scene.heard.clear()
    scene.now += 1
    scene.decide()
    told(scene, 0.5, 0.5, 0.5, 0.9)
    assert scene.notes.count("Straggler") == 1
