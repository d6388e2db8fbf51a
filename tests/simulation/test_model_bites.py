"""The model can fail: each safeguard of the operator is taken away in turn, and the machine must notice."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase as Phases
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent))

from invariants import Broken
from test_reconcile_crashes import Fault, play
from test_reconcile_model import CHECKS, TwoOperators, World
from trireme_api.protocol import Action
from trireme_api.replicas import Replicas
from trireme_operator import controller
from trireme_operator.decide import (
    afterwards,
    assignments,
    energy,
    gang,
    nodes,
    recovery,
    resizing,
    running,
    sizing,
    stopping,
    streaming,
)
from trireme_operator.observe import leases

Patch = Callable[[pytest.MonkeyPatch], Any]


def no_barrier(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(assignments, "barrier_passed", lambda found, attempt: True)


def no_waiting_for_the_old_pod(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gang, "occupied", lambda *_: False)


def energy_twice(patch: pytest.MonkeyPatch) -> None:
    real = energy.book

    def forgetful(status: Any, *rest: Any) -> None:
        status.energy.pods = {}
        real(status, *rest)

    patch.setattr(energy, "book", forgetful)


def a_suspended_job_keeps_its_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stopping, "give_back", lambda draft: None)


def a_job_that_waits_for_data_keeps_its_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(streaming, "give_back", lambda draft: None)


def data_are_taken_to_be_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(streaming, "lacks_data", lambda spec, status: False)


def the_end_of_a_session_is_a_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(running, "session_ended", lambda draft: False)


def orphans_are_left(patch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Any, key: Any) -> None:
        return None

    patch.setattr(controller.Controller, "_sweep", nothing)


def failures_are_counted_on_every_look(patch: pytest.MonkeyPatch) -> None:
    real = running._note_failure

    def twice(draft: Any, first: Any) -> None:
        real(draft, first)
        draft.status.restarts.by_cause["unknown"] = draft.status.restarts.by_cause.get("unknown", 0) + 1

    patch.setattr(running, "_note_failure", twice)


def another_size_in_the_same_attempt(patch: pytest.MonkeyPatch) -> None:
    def stay(draft: Any) -> None:
        draft.status.sizing.target = draft.status.sizing.since = None

    patch.setattr(resizing, "begin_attempt", stay)


def spares_are_told_to_run(patch: pytest.MonkeyPatch) -> None:
    real = assignments.Crew.assignment

    def told(self: Any, pod_uid: str) -> Any:
        answer = real(self, pod_uid)
        return replace(answer, action=Action.RUN) if answer.spare else answer

    patch.setattr(assignments.Crew, "assignment", told)


def a_size_that_nobody_permits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Replicas, "fit", lambda self, nodes: max(1, min(nodes, self.desired) - 1))


def pods_of_a_smaller_gang_stay(patch: pytest.MonkeyPatch) -> None:
    real = sizing.resized

    def larger(slots: Any, size: int, **more: Any) -> Any:
        return real(slots, size + 1, **more) or real(slots, size, **more)

    patch.setattr(sizing, "resized", larger)


def late_news_counts_as_another_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(running, "absorb", lambda draft: False)


def late_losses_change_the_attempt_that_is_under_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(afterwards, "begin_attempt", lambda draft: None)


def a_late_root_is_not_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(afterwards, "_correct", lambda draft, root: False)


def cordoned_nodes_are_not_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(running, "leave", lambda draft: None)


def cordoned_nodes_are_left_whatever_the_job_tolerates(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nodes, "cordoned", lambda node, tolerations: node.unschedulable)


def cordoned_nodes_are_left_though_there_is_no_other(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nodes, "_enough_without", lambda *_, **__: True)


def leaving_a_node_is_charged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_taken", lambda pod: {"taken": False, "charged": True, "disrupted": False})


def leases_are_not_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases.Leases, "sample", lambda self, renewals, now: set())


def a_silent_kubelet_is_a_lost_node(patch: pytest.MonkeyPatch) -> None:
    def at_once(self: gang.Place, silent_seconds: float) -> float:
        return 0.0 if self.node is not None and self.node.suspect else math.inf

    patch.setattr(gang.Place, "lost_at", at_once)


def samples_with_a_gap_are_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases, "LONGEST_GAP_SECONDS", math.inf)


@pytest.mark.parametrize(
    ("sabotage", "story"),
    [
        (a_suspended_job_keeps_its_slots, "suspend_and_resume"),
        (a_job_that_waits_for_data_keeps_its_slots, "waits_for_data_and_goes_on"),
        (data_are_taken_to_be_there, "waits_for_data_and_goes_on"),
        (the_end_of_a_session_is_a_failure, "waits_for_data_and_goes_on"),
        (late_news_counts_as_another_failure, "a_pod_falls_with_it"),
        (late_losses_change_the_attempt_that_is_under_way, "a_pod_falls_with_it"),
        (a_late_root_is_not_believed, "the_root_is_told_late"),
        (cordoned_nodes_are_not_left, "a_cordoned_node_is_left"),
        (cordoned_nodes_are_left_whatever_the_job_tolerates, "a_cordon_that_the_job_tolerates"),
        (cordoned_nodes_are_left_though_there_is_no_other, "a_cordon_without_room_elsewhere"),
        (leaving_a_node_is_charged, "a_cordoned_node_is_left"),
        (leases_are_not_read, "a_node_dies_before_kubernetes_says_so"),
        (a_silent_kubelet_is_a_lost_node, "a_kubelet_dies_alone"),
        (samples_with_a_gap_are_believed, "the_whole_world_pauses"),
        (another_size_in_the_same_attempt, "scaled_down_and_up"),
        (spares_are_told_to_run, "a_spare_steps_in"),
        (a_size_that_nobody_permits, "scaled_down_and_up"),
        (pods_of_a_smaller_gang_stay, "scaled_down_and_up"),
    ],
)
def test_a_story_notices(monkeypatch: pytest.MonkeyPatch, sabotage: Patch, story: str) -> None:
    sabotage(monkeypatch)
    with pytest.raises((Broken, AssertionError)):
        play(story, Fault())


SABOTAGE: tuple[tuple[Patch, type[World]], ...] = (
    (no_barrier, World),
    (no_waiting_for_the_old_pod, World),
    (energy_twice, World),
    (no_barrier, TwoOperators),
    (orphans_are_left, World),
    (failures_are_counted_on_every_look, World),
)


@pytest.mark.parametrize(("sabotage", "machine"), SABOTAGE, ids=lambda item: item.__name__)
def test_the_machine_notices(monkeypatch: pytest.MonkeyPatch, sabotage: Patch, machine: type[World]) -> None:
    sabotage(monkeypatch)
    quick = settings(CHECKS, max_examples=400, derandomize=True, database=None, phases=[Phases.generate])
    with pytest.raises((Broken, AssertionError)):
        run_state_machine_as_test(machine, settings=quick)
