"""The model can fail: each safeguard of the operator is taken away in turn, and the machine must notice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase as Phases
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent))

from model import Broken
from test_reconcile_model import CHECKS, TwoOperators, World
from trireme_operator import accounting, assignments, controller, gang, running, stopping

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
