"""Anytime learning at macro scale (ALMA, 2106.09563) in miniature: every learner at every waiting time, on the 1,797
handwritten digits that scikit-learn ships.

    python benchmarks/papers/alma/run.py             # about three minutes on one core
    python benchmarks/papers/alma/run.py --quick     # two seeds, two waiting times, few epochs; keeps nothing

A seed draws the split into stream and test set, the initial values and every shuffle; all learners of a seed see the
same stream. Each finished run is written at once; started again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from trireme_trainer.anytime.learners import Ensemble, GrowingEnsemble, GrowingMixture, Learner, Single
from trireme_trainer.anytime.loop import run as stream_through
from trireme_trainer.anytime.networks import perceptron
from trireme_trainer.anytime.session import Data, Fit
from trireme_trainer.anytime.stream import Plan

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import processes  # noqa: E402

STREAM = 1347
"""Samples that arrive; the other 450 are the test set."""
PIXELS, CLASSES = 64, 10
SMALL, LARGE = 8, 64
MEGA_BATCHES = 10
SMALL_SINGLE = f"single, width {SMALL}"
LARGE_SINGLE = f"single, width {LARGE}"


@dataclass(frozen=True)
class Method:
    make: Callable[[Fit, int], Learner]
    replay: float = 0.0


def network(width: int, grows: bool = False) -> Callable[[torch.Generator], torch.nn.Module]:
    return lambda random: perceptron(PIXELS, width, CLASSES, random, grows=grows)


METHODS: dict[str, Method] = {
    SMALL_SINGLE: Method(lambda fit, seed: Single(network(SMALL), fit, seed)),
    LARGE_SINGLE: Method(lambda fit, seed: Single(network(LARGE), fit, seed)),
    f"replay, width {SMALL}": Method(lambda fit, seed: Single(network(SMALL), fit, seed), replay=1.0),
    f"replay, width {LARGE}": Method(lambda fit, seed: Single(network(LARGE), fit, seed), replay=1.0),
    f"ensemble of 3, width {SMALL}": Method(lambda fit, seed: Ensemble(network(SMALL), fit, seed)),
    f"growing ensemble, width {SMALL}": Method(lambda fit, seed: GrowingEnsemble(network(SMALL), fit, seed)),
    f"growing mixture, width {SMALL}": Method(lambda fit, seed: GrowingMixture(network(SMALL, True), fit, seed)),
}


def digits(seed: int) -> tuple[Data, Data]:
    """Stream and test set: [samples, 64] between -0.5 and 0.5, and labels."""
    loaded = load_digits()
    order = np.random.RandomState(seed).permutation(len(loaded.target))
    inputs = torch.tensor(loaded.data[order] / 16 - 0.5, dtype=torch.float32)
    targets = torch.tensor(loaded.target[order], dtype=torch.long)
    return Data(inputs[:STREAM], targets[:STREAM]), Data(inputs[STREAM:], targets[STREAM:])


def run(name: str, wait: int, seed: int, fit: Fit) -> dict[str, Any]:
    """One stream. Errors are wrong answers among the 450 after each mega-batch."""
    began = time.perf_counter()
    data, test = digits(seed)
    method = METHODS[name]
    plan = Plan(MEGA_BATCHES, wait, method.replay)
    course = stream_through(method.make(fit, seed), data, test, plan, fit, seed)
    return {
        "cumulativeErrorRate": round(course.error_rate, 5), "finalErrorRate": round(course.final_error_rate, 5),
        "errors": [int(moment.errors) for moment in course.moments],
        "parameters": [moment.parameters for moment in course.moments],
        "memory": course.memory, "megaflops": round(course.flops / 1e6, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def key(name: str, wait: int, seed: int) -> str:
    return f"{name}; wait {wait}; seed {seed}"


def summary(runs: dict[str, dict[str, Any]], waits: list[int], seeds: list[int]) -> list[str]:
    """Tables: cumulative and final error by waiting time; cost at the shortest; differences seed by seed."""

    def of(name: str, wait: int, what: str) -> list[float]:
        return [runs[key(name, wait, seed)][what] for seed in seeds]

    lines = []
    for title, what in (("cumulative", "cumulativeErrorRate"), ("at the end", "finalErrorRate")):
        head = " | ".join(f"w = {wait}" for wait in waits)
        lines += ["", f"| error %, {title} | {head} |", "|---|" + "--:|" * len(waits)]
        for name in METHODS:
            cells = []
            for wait in waits:
                rates = [100 * rate for rate in of(name, wait, what)]
                cells.append(f"{statistics.mean(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "", f"At w = {waits[0]}:", "",
        "| learner | cumulative error % | parameters at the end | cumulative memory | compute, MFLOP |",
        "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name in METHODS:
        mean = {
            what: statistics.mean(of(name, waits[0], what)) for what in ("cumulativeErrorRate", "memory", "megaflops")
        }
        last = runs[key(name, waits[0], seeds[0])]["parameters"][-1]
        lines.append(
            f"| {name} | {100 * mean['cumulativeErrorRate']:.1f} | {last:,} "
            f"| {mean['memory']:,.0f} | {mean['megaflops']:,.0f} |"
        )
    lines += ["", f"| at w = {waits[0]} against {SMALL_SINGLE} | cumulative error, points by seed |", "|---|---|"]
    base = of(SMALL_SINGLE, waits[0], "cumulativeErrorRate")
    for name in list(METHODS)[1:]:
        apart = [100 * (b - a) for a, b in zip(base, of(name, waits[0], "cumulativeErrorRate"), strict=True)]
        lines.append(f"| {name} | {', '.join(f'{points:+.1f}' for points in apart)} |")
    return lines


def plot(runs: dict[str, dict[str, Any]], waits: list[int], seeds: list[int], path: Path) -> None:
    """Error after each mega-batch at the shortest waiting time, cumulative error over waiting time and over compute."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name in METHODS:
        curves = [[100 * e / 450 for e in runs[key(name, waits[0], seed)]["errors"]] for seed in seeds]
        mean = [statistics.mean(points) for points in zip(*curves, strict=True)]
        left.plot(range(1, MEGA_BATCHES + 1), mean, label=name)
        rates = {w: [100 * runs[key(name, w, s)]["cumulativeErrorRate"] for s in seeds] for w in waits}
        spent = [statistics.mean(runs[key(name, w, s)]["megaflops"] for s in seeds) for w in waits]
        means = [statistics.mean(rates[w]) for w in waits]
        middle.errorbar(
            waits, means, capsize=2,
            yerr=[[m - min(rates[w]) for m, w in zip(means, waits, strict=True)],
                  [max(rates[w]) - m for m, w in zip(means, waits, strict=True)]],
        )  # fmt: skip
        right.plot(spent, means, "o-")
    left.set(xlabel="mega-batches seen", ylabel=f"test error, % (w = {waits[0]})", yscale="log")
    left.legend(fontsize=7)
    middle.set(xlabel="waiting time, mega-batches", ylabel="cumulative error, %", yscale="log", xticks=waits)
    right.set(xlabel="training, forward MFLOP", ylabel="cumulative error, %", xscale="log", yscale="log")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50, help="of a session, at most")
    parser.add_argument("--waits", type=int, nargs="+", default=[1, 2, 5, 10], help="waiting times, of 10 mega-batches")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 2 waits, 15 epochs; prints, keeps nothing")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs, options.waits = 2, 15, [1, 10]
    torch.set_num_threads(1)
    fit = Fit(epochs=options.epochs, batch=32)
    shape = {"epochs": options.epochs, "megaBatches": MEGA_BATCHES, "stream": STREAM, "batch": fit.batch}
    data = f"digits of scikit-learn {version('scikit-learn')}"
    result: dict[str, Any] = {"machine": processes.machine(), "data": data, "shape": shape, "runs": {}}
    if options.output.exists() and not options.quick:
        known = json.loads(options.output.read_text())
        if (known["shape"], known["data"]) == (shape, data):
            result = known
    seeds, picture = list(range(1, options.seeds + 1)), options.output.with_suffix(".svg")
    before = len(result["runs"])
    for seed in seeds:
        for wait in options.waits:
            for name in METHODS:
                told = key(name, wait, seed)
                if told in result["runs"]:
                    continue
                result["runs"][told] = run(name, wait, seed, fit)
                if not options.quick:
                    options.output.write_text(json.dumps(result) + "\n")
                print(f"{told}: {result['runs'][told]['cumulativeErrorRate']:.3f}", flush=True)
    print("\n".join(summary(result["runs"], options.waits, seeds)))
    if not options.quick and (len(result["runs"]) > before or not picture.exists()):
        plot(result["runs"], options.waits, seeds, picture)


if __name__ == "__main__":
    main()
