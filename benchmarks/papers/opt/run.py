"""OPT (2205.01068) in miniature: does the loss fall with size, at equal tokens? Five sizes, the same text, seeds.

    python benchmarks/papers/opt/run.py             # about ten minutes on one idle core
    python benchmarks/papers/opt/run.py --steps 2000 --widths 64 128 256 512 --output big.json   # where there is time

All sizes of a seed see the same batches and are judged on the same held-out text. Each size has its own learning rate:
of the same few, the best on a seed that is not measured.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import learning
from miniature import TUNING, Miniature, Options, Run, Runs, best, english, main, seeds

VOCABULARY, LENGTH, ROWS, LAYERS = 512, 64, 16, 2
HELD_OUT = 256
"""Blocks of held-out text."""
Points = list[tuple[int, list[float]]]


def recipe(options: Options, width: int, rate: float, seed: int, corpus: Path) -> Recipe:
    """OPT's settings (§2.2) but for sizes and rates: AdamW 0.9, 0.95, decay 0.1, clipping at 1, linear to 10 %."""
    tokens = ROWS * LENGTH
    shape = {
        "layers": LAYERS, "width": width, "embeddingWidth": width, "feedForwardWidth": 4 * width,
        "heads": max(1, width // 16), "dropout": 0.0, "attentionDropout": 0.0, "vocabularySize": VOCABULARY,
        "maximumPositions": LENGTH, "initialStd": 0.05,
    }  # fmt: skip
    return Recipe.model_validate({
        "model": {"preset": "opt-tiny", "overrides": shape},
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": rate},
        "schedule": {"warmupTokens": options.steps // 10 * tokens},
        "precision": "fp32",
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(options: Options, width: int, rate: float, seed: int, corpus: Path) -> Run:
    spec = recipe(options, width, rate, seed, corpus)
    config = check_recipe(spec)
    found = learning.learn(spec, [options.steps // 2, options.steps], HELD_OUT)
    return {**found, "heldOutLoss": found["heldOutLosses"][-1],
            "blockParameters": config.layers * config.block_parameters()}  # fmt: skip


def key(width: int, rate: float, seed: int) -> str:
    return f"width {width}; rate {rate:g}; seed {seed}"


def fit(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    """ln loss = a − b ln N, least squares: (e^a, b, R²)."""
    x, y = np.log(sizes), np.log(losses)
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    return math.exp(intercept), -float(slope), 1 - float(left.var() / y.var())


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[Path], Run]]]:
    for width in options.widths:
        for rate in options.rates:
            yield key(width, rate, TUNING), partial(run, options, width, rate, TUNING)
    for seed in seeds(options):
        for width in options.widths:
            rate = best_rate(options, runs, width)
            yield key(width, rate, seed), partial(run, options, width, rate, seed)


def best_rate(options: Options, runs: Runs, width: int) -> float:
    return best(options.rates, lambda rate: runs[key(width, rate, TUNING)]["heldOutLoss"])


def points(options: Options, runs: Runs) -> Points:
    """(parameters of the blocks, losses by seed) of each size at its rate."""
    found: Points = []
    for width in options.widths:
        mine = [runs[key(width, best_rate(options, runs, width), seed)] for seed in seeds(options)]
        found.append((mine[0]["blockParameters"], [one["heldOutLoss"] or math.inf for one in mine]))
    return found


def table(options: Options, runs: Runs) -> list[str]:
    lines = [
        f"| width | {' | '.join(f'rate {rate:g}' for rate in options.rates)} |",
        "|--:|" + "--:|" * len(options.rates),
    ]
    for width in options.widths:
        tried = [runs[key(width, rate, TUNING)]["heldOutLoss"] for rate in options.rates]
        lines.append(f"| {width} | {' | '.join('diverged' if loss is None else f'{loss:.3f}' for loss in tried)} |")
    lines += [
        "", "| width | parameters | of them in blocks, N | MFLOP a token | rate | held-out loss | by seed |",
        "|--:|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    found = points(options, runs)
    for width, (blocks, losses) in zip(options.widths, found, strict=True):
        rate = best_rate(options, runs, width)
        row = runs[key(width, rate, 1)]
        lines.append(
            f"| {width} | {row['parameters']:,} | {blocks:,} | {row['flopsPerToken'] / 1e6:.2f} "
            f"| {rate:g} | {statistics.mean(losses):.3f} | {', '.join(f'{loss:.3f}' for loss in losses)} |"
        )
    sizes = [size for size, _ in found]
    each = {f"seed {seed}": [losses[number] for _, losses in found] for number, seed in enumerate(seeds(options))}
    each["mean"] = [statistics.mean(losses) for _, losses in found]
    lines += ["", "| | power law | R² | falls from each size to the next |", "|---|---|--:|---|"]
    for name, losses in each.items():
        scale, slope, share = fit(sizes, losses)
        falls = all(b < a for a, b in itertools.pairwise(losses))
        lines.append(f"| {name} | {scale:.2f} · N^-{slope:.3f} | {share:.3f} | {'yes' if falls else 'no'} |")
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    """Held-out loss over the blocks' parameters, both logarithmic; a point per seed and the fitted line."""
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    found = points(options, runs)
    sizes = [size for size, _ in found]
    scale, slope, _ = fit(sizes, [statistics.mean(losses) for _, losses in found])
    axes.plot(sizes, [scale * size**-slope for size in sizes], color="black", label=f"{scale:.2f} · N^-{slope:.3f}")
    for size, losses in found:
        axes.plot([size] * len(losses), losses, "o", color="tab:blue", alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="parameters of the blocks, N", ylabel="held-out loss, nats a token")
    axes.legend()
    return figure


PAPER = Miniature(
    __file__, __doc__,
    settings={"steps": 500, "seeds": 3, "widths": [8, 16, 32, 64, 128], "rates": [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]},
    quick={"steps": 10, "seeds": 1, "widths": [8, 32], "rates": [1e-2]},
    shape=lambda options: {"steps": options.steps, "layers": LAYERS, "tokens": options.steps * ROWS * LENGTH},
    corpus=english(VOCABULARY), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
