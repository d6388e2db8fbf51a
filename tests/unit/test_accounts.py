"""The pure parts of `make accounts`: what agrees, what does not, and the witness's own integration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("tests", "tests/e2e", "tests/monitoring", "tests/apiserver", "cluster")]

from accounts.judge import Check, only, sums  # noqa: E402
from accounts.powercap import SPAN, ZONES, SimulatedPowercap, watts  # noqa: E402
from accounts.scrape import counted  # noqa: E402
from accounts.witness import Integral, gained  # noqa: E402
from trireme_agent import rapl  # noqa: E402


def test_figures_agree_within_their_bound_and_not_beyond_it() -> None:
    assert Check("steps", {"status": 100, "log": 100}).holds
    assert not Check("steps", {"status": 100, "log": 101}).holds
    assert Check("joules", {"status": 990.1, "witness": 1000.0}, relative=0.01).holds
    assert not Check("joules", {"status": 989.0, "witness": 1000.0}, relative=0.01).holds
    assert Check("seconds", {"ledger": 10.0, "watched": 11.5}, absolute=2.0).holds


def test_what_nobody_tells_agrees_with_nothing() -> None:
    assert not Check("grams", {"status": 1.0, "prometheus": None}).holds
    assert not Check("grams", {"status": 1.0}).holds, "one figure alone is no agreement"
    assert only({}) is None
    assert only({"a": 1.0, "b": 2.0}) is None, "two series, one of which is double counting"


def test_a_ledger_that_loses_a_second_does_not_hold() -> None:
    def ledger(second: float) -> dict[str, object]:
        rows = [{"attempt": 1, "seconds": {"init": 5.0, "step": 55.0}}, {"attempt": 2, "seconds": {"step": second}}]
        return {"goodput": {"seconds": {"init": 5.0, "step": 95.0}, "attempts": rows}}

    assert all(check.holds for check in sums(ledger(40.0), 1000.0, 1100.5, {1: 60.2, 2: 40.3}))
    assert [check.what for check in sums(ledger(39.0), 1000.0, 1100.5, {1: 60.2, 2: 40.3}) if not check.holds] == [
        "seconds in all"
    ]
    assert not all(check.holds for check in sums(ledger(40.0), 1000.0, 1105.0, {1: 60.2, 2: 40.3}))
    assert not all(check.holds for check in sums(ledger(40.0), 1000.0, 1100.5, {1: 60.2})), "an attempt nobody saw"


def test_the_witness_shares_energy_out_by_processor_time() -> None:
    pod = Integral(cpu=10.0)
    pod.add({"cpu": 40.0, "dram": 4.0}, cpu=10.5, busy=2.0)
    pod.add({"cpu": 40.0, "dram": 4.0}, cpu=12.5, busy=2.0)
    pod.add({"cpu": 40.0, "dram": 4.0}, cpu=14.5, busy=0.0)
    assert pod.joules == {"cpu": 50.0, "dram": 5.0}
    assert gained(SPAN - 5, 10, SPAN) == 15


def test_a_counter_that_began_anew_has_counted_all_of_it() -> None:
    assert counted([0.0, 5.0, 9.0, 1.0, 4.0]) == 13.0


def test_agents_read_the_simulated_counters(tmp_path: Path) -> None:
    powercap = SimulatedPowercap(tmp_path / "powercap")
    (cpu,), (dram,) = (rapl.zones(name, str(powercap.root)) for name in ("cpu", "dram"))
    assert (cpu.span, dram.span) == (SPAN, SPAN)
    with powercap:
        while not cpu.joules():
            pass
    assert cpu.joules() > 0
    assert set(ZONES.values()) == {"package-0", "dram"}
    levels = [watts("package-0", at, 1.0) for at in range(60)]
    assert max(levels) > 1.3 * min(levels), "whoever takes the power for constant must be found out"
    assert watts("dram", 0.0, 2.0) == pytest.approx(3.0)
