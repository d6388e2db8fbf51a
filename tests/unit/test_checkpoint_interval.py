"""How often to save: the formula, its bounds, and the agreement of ranks on it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trireme_api.reliability import mean_time_between_failures, young
from trireme_trainer.checkpoint.interval import (
    FIRST_SAVE,
    MAX_SECONDS,
    AutoInterval,
    Measured,
    Slowing,
    interval_steps,
)


def lost_share(interval: float, cost: float, mtbf: float) -> float:
    """Young's model: a save each interval, and half an interval of work lost at each failure."""
    return cost / interval + interval / 2 / mtbf


@given(st.floats(0.01, 100), st.floats(1e3, 1e7), st.floats(0.2, 5))
def test_no_other_interval_loses_less(cost: float, mtbf: float, factor: float) -> None:
    best = young(cost, mtbf)
    assert lost_share(best, cost, mtbf) <= lost_share(best * factor, cost, mtbf) * (1 + 1e-9)


def test_by_hand() -> None:
    # 5 s a save, a failure every 7.9 h: the square root of 2 · 5 · 28440.
    assert young(5, 7.9 * 3600) == pytest.approx(533.3, abs=0.1)
    assert young(100, 100) == 100, "saves dearer than half the time between failures"
    assert mean_time_between_failures(128, 0, 0) == pytest.approx(7.9 * 3600), "1,024 GPUs of 8 a node"
    assert mean_time_between_failures(128, 3, 7.9 * 3600) == pytest.approx(7.9 * 3600 / 2)


@given(
    st.floats(0, 1e3), st.floats(0, 1e4), st.floats(1e-3, 1e3), st.integers(1, 4096), st.integers(0, 1000),
    st.floats(0, 1e7),
)  # fmt: skip
def test_bounds(cost: float, duration: float, step: float, nodes: int, failures: int, seconds: float) -> None:
    mtbf = mean_time_between_failures(nodes, failures, seconds)
    steps = interval_steps(cost=cost, duration=duration, step_seconds=step, mtbf=mtbf)
    assert steps >= 1
    assert steps * step >= duration - step, "never a save while the one before is being written"
    assert steps * step <= max(MAX_SECONDS, duration) + step


def test_experience_outweighs_the_prior() -> None:
    """One failure an hour for a hundred hours, on 16 nodes: within a tenth of an hour."""
    assert mean_time_between_failures(16, 100, 100 * 3600) == pytest.approx(3600, rel=0.7)
    assert mean_time_between_failures(16, 1000, 1000 * 3600) == pytest.approx(3600, rel=0.1)


def run(auto: AutoInterval, steps: range, measured: Measured, lag: int, log: list[int]) -> list[int]:
    """Steps at which one rank saves, when a save is known `lag` steps after it began; `log` collects agreements."""
    saved: list[int] = []
    for step in steps:
        known = measured if saved and step >= saved[-1] + lag else None

        def agree(values: object, step: int = step) -> list[float]:
            log.append(step)
            return list(values)  # type: ignore[call-overload]

        if auto.due(step, float(step), known, agree):
            saved.append(step)
    return saved


def test_saves_once_to_learn_then_by_the_formula() -> None:
    auto = AutoInterval(100, nodes=2, failures=1000, seconds=1000 * 800.0)
    asked: list[int] = []
    saved = run(auto, range(101, 402), Measured(1.0, 3.0, 1.0), lag=3, log=asked)
    assert saved[0] == 100 + FIRST_SAVE
    gaps = {b - a for a, b in pairwise(saved)}
    expected = math.sqrt(2 * 1.0 * auto.mtbf)
    assert all(abs(gap - expected) < 2 for gap in gaps), (gaps, expected)
    assert len(asked) == 3 * len(saved), "agreed upon 1, 2 and 4 steps after each save, then no more"
    assert auto.figures()["failures"] == 1000


def test_ranks_that_do_not_know_yet_hold_everybody() -> None:
    """The mean of the flags is below 1 while any rank has not seen its save end."""
    auto = AutoInterval(0, nodes=1, failures=0, seconds=0)
    for step in range(1, FIRST_SAVE):
        assert not auto.due(step, 0.0, None, pytest.fail)
    assert auto.due(FIRST_SAVE, 0.0, None, pytest.fail)
    for step in range(FIRST_SAVE + 1, FIRST_SAVE + 1000):
        assert not auto.due(step, 0.0, Measured(1, 1, 1), lambda values: [0.5, *list(values)[1:]])
    assert auto.steps is None


def test_slower_steps_are_part_of_the_cost() -> None:
    slowing = Slowing()
    slowing.step(60.0, saving=False)
    assert slowing.step_seconds == 0, "the first step of a process is none to go by"
    for _ in range(10):
        slowing.step(1.0, saving=False)
    for _ in range(3):
        slowing.step(1.5, saving=True)
    assert slowing.saved() == pytest.approx(1.5)
    assert slowing.saved() == 0
    assert slowing.step_seconds == pytest.approx(1.0)
    slowing.step(0.5, saving=True)
    assert slowing.saved() == 0, "a lucky step does not make a save a gain"
