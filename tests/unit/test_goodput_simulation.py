"""The goodput benchmark: its time adds up, and it finds what can be worked out by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "goodput"))

from simulate import measured, simulate


def test_shares_add_up_to_the_whole() -> None:
    one = simulate([5.0, 20.0], mtbf=3600.0, cost=0.2)
    assert one.goodput + one.saving + one.lost + one.recovering == pytest.approx(1.0, abs=1e-9)
    assert one.failures == pytest.approx(10_000, rel=0.05)


def test_it_agrees_with_the_first_order_formula() -> None:
    """Young: what is lost is C/τ for saving, τ/2 per failure for work done again, and the recovery."""
    cost, mtbf, recovery = 0.2, 3600.0, 10.0
    every = math.sqrt(2 * cost * mtbf)
    expected = cost / every + (every / 2 + recovery) / mtbf
    assert 1 - simulate([recovery], mtbf=mtbf, cost=cost).goodput == pytest.approx(expected, rel=0.05)


def test_without_failures_only_saving_costs() -> None:
    one = simulate([1.0], mtbf=1e12, cost=1.0, hours=1.0)
    assert (one.failures, one.lost, one.recovering) == (0, 0.0, 0.0)


def test_pauses_are_no_recoveries() -> None:
    trial = {"trials": [{"total": 1.5}]}
    results = {"faults": {"a": {"kind": "recovery", **trial}, "b": {"kind": "pause", **trial}}}
    assert measured(results) == {"a": [1.5]}
