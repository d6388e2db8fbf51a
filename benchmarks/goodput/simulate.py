"""Goodput of a long run at a given failure rate, from what recoveries were measured to take.

python benchmarks/goodput/simulate.py benchmarks/results/chaos-cluster.json --mtbf 3600

A simulation, not a measurement: failures come at random (exponential, fixed seed), each is one of the measured trials
of the chaos suite drawn at random, and the job saves at Young's interval. Time from a failure to the first new step is
the trial's own; the work since the last save is done again. What it cannot know: failures during a recovery (they are
drawn only while training runs), storage that is slower for larger models, queues for new nodes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("api", "trainer")]

from trireme_api.reliability import young  # noqa: E402

HOURS = 10_000.0


@dataclass(frozen=True)
class Outcome:
    """Shares of the wall time."""

    goodput: float
    saving: float
    lost: float
    """Work done again."""
    recovering: float
    failures: int
    interval: float
    """Seconds between saves."""


def simulate(recoveries: Sequence[float], *, mtbf: float, cost: float, hours: float = HOURS, seed: int = 1) -> Outcome:
    """`recoveries`: seconds from a failure to the first new step; `cost`: seconds of training one save takes away."""
    draw = random.Random(seed)
    every = young(cost, mtbf)
    end = hours * 3600.0
    clock = done = saving = lost = recovering = 0.0
    failures = 0
    while clock < end:
        until_failure = min(draw.expovariate(1 / mtbf), end - clock)
        saves, rest = divmod(until_failure, every + cost)
        since_save = min(rest, every)
        clock += until_failure
        saving += saves * cost + (rest - since_save)
        done += saves * every
        if clock >= end:
            done += since_save
            break
        failures += 1
        lost += since_save
        recovery = draw.choice(recoveries)
        recovering += recovery
        clock += recovery
    return Outcome(done / clock, saving / clock, lost / clock, recovering / clock, failures, every)


def measured(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Fault → total seconds of its trials; pauses cost no restart and are left out."""
    faults = results["faults"].items()
    return {
        name: [trial["total"] for trial in found["trials"]]
        for name, found in faults
        if found["kind"] == "recovery" and found["trials"]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `make chaos` has stored")
    parser.add_argument("--mtbf", type=float, default=3600.0, help="mean seconds between failures of the whole job")
    parser.add_argument("--cost", type=float, default=0.16, help="seconds a save takes away; measured: 0.15 in all")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    found = measured(json.loads(options.results.read_text()))
    if not found:
        parser.error(f"{options.results}: no recovery was measured")
    rows = {"all of them": [total for totals in found.values() for total in totals], **found}
    outcomes = {
        name: simulate(totals, mtbf=options.mtbf, cost=options.cost) for name, totals in rows.items()
    }
    every = outcomes["all of them"].interval
    print(f"one failure per {options.mtbf / 3600:g} h, {HOURS:,.0f} h, a save each {every:.0f} s")
    print(f"{'failure':32} {'goodput':>8} {'saving':>8} {'lost':>8} {'recovering':>11}")
    for name, one in outcomes.items():
        print(f"{name:32} {one.goodput:8.2%} {one.saving:8.2%} {one.lost:8.2%} {one.recovering:11.2%}")
    if options.output:
        figures = {name: vars(one) for name, one in outcomes.items()}
        content = {"mtbfSeconds": options.mtbf, "saveCostSeconds": options.cost, "hours": HOURS, "outcomes": figures}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
