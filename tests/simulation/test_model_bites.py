"""The model can fail: each safeguard of the operator is taken away in turn, and the machine must notice."""

from __future__ import annotations

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

from model import Broken
from test_reconcile_crashes import Fault, play
from test_reconcile_model import CHECKS, TwoOperators, World
from trireme_api.protocol import Action
from trireme_api.replicas import Replicas
from trireme_operator import accounting, assignments, controller, gang, resizing, running, sizing, stopping

Patch = Callable[[pytest.MonkeyPatch], Any]


def no_barrier(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(assignments, "barrier_passed", lambda found, attempt: True)


def no_waiting_for_the_old_pod(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gang, "occupied", lambda *_: False)


def energy_twice(patch: pytest.MonkeyPatch) -> None:
    real = accounting._energy

    def forgetful(status: Any, seen: Any) -> None:
        status.energy.by_pod = {}
        real(status, seen)

    patch.setattr(accounting, "_energy", forgetful)


def a_suspended_job_keeps_its_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stopping, "give_back", lambda draft: None)


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


@pytest.mark.parametrize(
    ("sabotage", "story"),
    [
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
    (a_suspended_job_keeps_its_slots, World),
    (orphans_are_left, World),
    (failures_are_counted_on_every_look, World),
)


@pytest.mark.parametrize(("sabotage", "machine"), SABOTAGE, ids=lambda item: item.__name__)
def test_the_machine_notices(monkeypatch: pytest.MonkeyPatch, sabotage: Patch, machine: type[World]) -> None:
    sabotage(monkeypatch)
    quick = settings(CHECKS, max_examples=400, derandomize=True, database=None, phases=[Phases.generate])
    with pytest.raises((Broken, AssertionError)):
        run_state_machine_as_test(machine, settings=quick)
