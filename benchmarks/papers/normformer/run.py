"""NormFormer (2110.09456) in miniature: against the pre-LN baseline at each learning rate and at each one's best, and
how far the gradients of early and late layers are apart.

    python benchmarks/papers/normformer/run.py             # about seven minutes on one idle core
    python benchmarks/papers/normformer/run.py --steps 2000 --layers 12 --width 256   # where there is a GPU or time

Both start from the same initial values where they have the same parameters, see the same batches, and are judged on the
same held-out text.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from trireme_api.recipe import Recipe
from trireme_trainer.families import LanguageModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import learning
from miniature import Miniature, Options, Run, Runs, english, main, seeds, spread

VOCABULARY, LENGTH, ROWS = 512, 64, 16
OFF = {"postAttentionNorm": False, "headScale": "none", "innerNorm": False, "residualScale": False}
MODELS: dict[str, dict[str, Any]] = {"pre-LN": OFF, "NormFormer": {}}
HELD_OUT = 128
"""Blocks of held-out text."""


def recipe(options: Options, model: str, rate: float, seed: int, corpus: Path) -> Recipe:
    shape = {
        "layers": options.layers, "width": options.width, "heads": options.width // 32, "dropout": 0.0,
        "attentionDropout": 0.0, "vocabularySize": VOCABULARY, "maximumPositions": LENGTH,
    }  # fmt: skip
    tokens = ROWS * LENGTH
    return Recipe.model_validate({
        "model": {"preset": "normformer-tiny", "overrides": {**shape, **MODELS[model]}},
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": rate, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "finalFraction": 0.0},
        "precision": "fp32",
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(options: Options, model: str, rate: float, seed: int, corpus: Path) -> Run:
    """One training: held-out loss at the end (infinite where it diverged) and the gradients' ratio on the way."""
    learner = learning.Learner(recipe(options, model, rate, seed, corpus))
    ratios: list[float] = []

    def look(step: int) -> None:
        if step % 10 == 0:
            ratios.append(early_to_late(learner.model))

    losses = [loss for _, loss in learner.steps(look)]
    loss = learner.held_out(HELD_OUT)
    return {
        "heldOutLoss": loss if math.isfinite(loss) else None, "losses": [round(x, 4) for x in losses[::10]],
        "ratios": [round(x, 4) for x in ratios], "parameters": learner.config.parameters().total,
    }  # fmt: skip


def early_to_late(model: LanguageModel) -> float:
    """Mean absolute gradient of the feed-forward layers' second matrices (what the paper plots, as L1 norms): first
    quarter of the layers over the last."""
    blocks: list[Any] = list(model.blocks)
    sizes = [float(block.feed_forward.fc2.weight.grad.abs().mean()) for block in blocks]
    part = max(1, len(sizes) // 4)
    return sum(sizes[:part]) / max(sum(sizes[-part:]), 1e-30)


def table(options: Options, runs: Runs) -> list[str]:
    rates = options.rates

    def losses(model: str, rate: float) -> list[float]:
        return [runs[key(model, rate, seed)]["heldOutLoss"] or math.inf for seed in seeds(options)]

    lines = ["| peak learning rate | pre-LN | NormFormer | difference, by seed |", "|--:|--:|--:|---|"]
    for rate in rates:
        pre, normed = losses("pre-LN", rate), losses("NormFormer", rate)
        apart = ", ".join(f"{b - a:+.3f}" for a, b in zip(pre, normed, strict=True))
        lines.append(f"| {rate:g} | {spread(pre)} | {spread(normed)} | {apart} |")
    best = {model: min(rates, key=lambda rate: statistics.mean(losses(model, rate))) for model in MODELS}
    pre, normed = losses("pre-LN", best["pre-LN"]), losses("NormFormer", best["NormFormer"])
    apart = ", ".join(f"{b - a:+.3f}" for a, b in zip(pre, normed, strict=True))
    lines.append(
        f"| each one's best: {best['pre-LN']:g}, {best['NormFormer']:g} | {spread(pre)} | {spread(normed)} | {apart} |"
    )
    lines += ["", "| gradients, early over late layers | pre-LN | NormFormer |", "|---|--:|--:|"]
    for rate in rates:
        cells = []
        for model in MODELS:
            middle = [statistics.median(runs[key(model, rate, seed)]["ratios"]) for seed in seeds(options)]
            cells.append(spread(middle, 2))
        lines.append(f"| peak learning rate {rate:g} | {' | '.join(cells)} |")
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    """Held-out loss over the peak learning rate, and the gradients' ratio over the run; a point or line per seed."""
    rates, middle = options.rates, options.rates[len(options.rates) // 2]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for model, colour in zip(MODELS, ("tab:gray", "tab:blue"), strict=True):
        points = {s: [runs[key(model, r, s)]["heldOutLoss"] or math.nan for r in rates] for s in seeds(options)}
        means = [statistics.mean(column) for column in zip(*points.values(), strict=True)]
        left.plot(rates, means, color=colour, label=model)
        for seed in seeds(options):
            left.plot(rates, points[seed], "o", color=colour, alpha=0.5)
            ratios = runs[key(model, middle, seed)]["ratios"]
            right.plot([10 * (i + 1) for i in range(len(ratios))], ratios, color=colour, alpha=0.7)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats a token")
    left.legend()
    right.set(xlabel="step", ylabel=f"gradients, early over late (at {middle:g})")
    right.axhline(1.0, color="black", linewidth=0.5)
    return figure


def key(model: str, rate: float, seed: int) -> str:
    return f"{model} {rate:g} {seed}"


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[Path], Run]]]:
    for seed in seeds(options):
        for rate in options.rates:
            for model in MODELS:
                yield key(model, rate, seed), partial(run, options, model, rate, seed)


PAPER = Miniature(
    __file__, __doc__,
    settings={"steps": 150, "layers": 8, "width": 64, "seeds": 3, "rates": [3e-3, 6e-3, 1e-2, 2e-2, 3e-2]},
    quick={"steps": 10, "seeds": 1, "rates": [1e-2]},
    shape=lambda options: {name: getattr(options, name) for name in ("steps", "layers", "width")},
    corpus=english(VOCABULARY), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
