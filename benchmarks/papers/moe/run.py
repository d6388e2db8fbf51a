"""Mixtures of experts (2112.10684) in miniature: training FLOPs to reach a loss, dense against top-2 mixtures.

    python benchmarks/papers/moe/run.py             # about ten minutes on one idle core
    python benchmarks/papers/moe/run.py --steps 4000 --layers 6 --width 256 --output big.json   # where there is time

Same width, layers, batches and settings; every second block of a mixture has experts of the dense layer's size. The
learning rate stays constant after warm-up, so that each point of a curve is a model one could have stopped at; of the
same few rates each model has the best on a seed that is not measured.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from trireme_api.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import learning
from miniature import TUNING, Miniature, Options, Run, Runs, best, english, main, seeds

VOCABULARY, LENGTH, ROWS = 512, 64, 16
HELD_OUT, PROBE = 128, 25
"""Blocks of held-out text; steps between measurements."""
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"preset": "gpt-tiny"},
    "8 experts": {"preset": "moe-tiny", "experts": 8},
}
COLOURS = {"dense": "tab:gray", "8 experts": "tab:blue"}


def recipe(options: Options, model: str, rate: float, seed: int, corpus: Path) -> Recipe:
    tokens = ROWS * LENGTH
    own = dict(MODELS[model])
    shape = {
        "layers": options.layers, "width": options.width, "heads": max(1, options.width // 32), "dropout": 0.0,
        "attentionDropout": 0.0, "vocabularySize": VOCABULARY, "maximumPositions": LENGTH,
    }  # fmt: skip
    return Recipe.model_validate({
        "model": {"preset": own.pop("preset"), "overrides": {**shape, **own}},
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": rate, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 1.0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "decay": "constant"},
        "precision": "fp32",
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(options: Options, model: str, rate: float, seed: int, corpus: Path) -> Run:
    probes = range(PROBE, options.steps + 1, PROBE)
    return learning.learn(recipe(options, model, rate, seed, corpus), probes, HELD_OUT)


def key(model: str, rate: float, seed: int) -> str:
    return f"{model}; rate {rate:g}; seed {seed}"


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[Path], Run]]]:
    for model in MODELS:
        for rate in options.rates:
            yield key(model, rate, TUNING), partial(run, options, model, rate, TUNING)
    for seed in seeds(options):
        for model in MODELS:
            rate = best_rate(options, runs, model)
            yield key(model, rate, seed), partial(run, options, model, rate, seed)


def best_rate(options: Options, runs: Runs, model: str) -> float:
    return best(options.rates, lambda rate: curve(runs[key(model, rate, TUNING)])[-1][1])


def curve(row: dict[str, Any]) -> list[tuple[float, float]]:
    """(training GFLOP so far, lowest held-out loss so far)."""
    points, best = [], float("inf")
    for step, loss in zip(row["probes"], row["heldOutLosses"], strict=True):
        best = min(best, loss if loss is not None else best)
        points.append((step * ROWS * LENGTH * row["flopsPerToken"] / 1e9, best))
    return points


def reached(points: list[tuple[float, float]], loss: float) -> float | None:
    """GFLOP at which the curve falls to `loss`, between two measurements by a straight line; None: never."""
    for (before, above), (after, below) in itertools.pairwise(points):
        if below <= loss < above:
            return before + (after - before) * (above - loss) / (above - below)
    return None


def table(options: Options, runs: Runs) -> list[str]:
    lines = [
        f"| lowest held-out loss, seed {TUNING} | " + " | ".join(f"rate {rate:g}" for rate in options.rates) + " |",
        "|---" + "|--:" * len(options.rates) + "|",
    ]
    for model in MODELS:
        tried = [curve(runs[key(model, rate, TUNING)])[-1][1] for rate in options.rates]
        lines.append(f"| {model} | {' | '.join(f'{loss:.3f}' for loss in tried)} |")
    rates = {model: best_rate(options, runs, model) for model in MODELS}
    of = {model: [runs[key(model, rate, seed)] for seed in seeds(options)] for model, rate in rates.items()}
    lines += [
        "", "| model | parameters | activated | MFLOP a token | rate | lowest held-out loss | by seed |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for model, mine in of.items():
        row, ends = mine[0], [curve(one)[-1][1] for one in mine]
        lines.append(
            f"| {model} | {row['parameters']:,} | {row['activated']:,} | {row['flopsPerToken'] / 1e6:.2f} "
            f"| {rates[model]:g} | {statistics.mean(ends):.3f} | {', '.join(f'{loss:.3f}' for loss in ends)} |"
        )
    lines += ["", f"| GFLOP to the loss that dense has after | {' | '.join(MODELS)} | dense over mixture, by seed |"]
    lines.append("|---" + "|--:" * len(MODELS) + "|---|")
    for share in (0.5, 0.75, 1.0):
        spent: dict[str, list[float | None]] = {model: [] for model in MODELS}
        for number, dense in enumerate(map(curve, of["dense"])):
            target = dense[round(share * len(dense)) - 1][1]
            for model in MODELS:
                spent[model].append(reached(curve(of[model][number]), target))
        cells, ratios = [], []
        for model, found in spent.items():
            known = [value for value in found if value is not None]
            never = "" if len(known) == len(found) else f" ({len(found) - len(known)} never)"
            cells.append((f"{statistics.mean(known):.0f}" if known else "") + never)
            if model != "dense":
                each = [f"{a / b:.2f}" if a and b else "never" for a, b in zip(spent["dense"], found, strict=True)]
                ratios.append(f"{model}: {', '.join(each)}")
        lines.append(f"| {share:.0%} of its steps | {' | '.join(cells)} | {'; '.join(ratios)} |")
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    """Held-out loss over training FLOPs, a line per seed."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for model in MODELS:
        for number, seed in enumerate(seeds(options)):
            spent, losses = zip(*curve(runs[key(model, best_rate(options, runs, model), seed)]), strict=True)
            axes.plot(spent, losses, color=COLOURS[model], alpha=0.8, label="" if number else model)
    axes.set(xscale="log", xlabel="training GFLOP", ylabel="held-out loss, nats a token")
    axes.legend()
    return figure


PAPER = Miniature(
    __file__, __doc__,
    settings={"steps": 1500, "layers": 2, "width": 32, "rates": [2.5e-3, 5e-3, 1e-2, 2e-2], "seeds": 3},
    quick={"steps": 50, "seeds": 1, "rates": [1e-2]},
    shape=lambda options: {name: getattr(options, name) for name in ("steps", "layers", "width")},
    corpus=english(VOCABULARY), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
