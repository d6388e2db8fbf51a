"""Sparse all-MLP (2203.06850) in miniature: against dense models and Transformer mixtures at equal FLOPs per token.

    python benchmarks/papers/smlp/run.py             # a quarter of an hour on one idle core
    python benchmarks/papers/smlp/run.py --steps 2000 --layers 12 --width 256   # where there is a GPU or time

All have the same width, number of blocks, batches and steps; one inner width of each is set so that a token costs as
many forward FLOPs as in the dense Transformer. Of the same few rates each model has the best on a seed that is not
measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from trireme_api.families import ModelConfig, resolve
from trireme_api.recipe import ModelSpec, Recipe
from trireme_trainer.layers.auxiliary import set_share

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import learning
from miniature import TUNING, Miniature, Options, Run, Runs, best, english, main, seeds, spread

VOCABULARY, LENGTH, ROWS, EXPERTS = 512, 64, 8, 8
HELD_OUT, HELD_OUT_ON_THE_WAY = 128, 32
"""Blocks of held-out text."""
POINTS = 10
"""Times that a run is judged on the way."""
MIXED = {"experts": EXPERTS, "expertGradients": "mean"}
SPARSE = {**MIXED, "spatialExperts": EXPERTS, "sparseLayers": 2}
DENSE = "dense Transformer"
# name: preset, overrides, the width that is set for equal FLOPs, and what that must be a multiple of.
MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    DENSE: ("gpt-tiny", {}, "feedForwardWidth", 2),
    "dense gMLP": ("gmlp-tiny", {}, "innerWidth", 2),
    "Switch": ("moe-tiny", {**MIXED, "router": "top-1"}, "feedForwardWidth", 2),
    "GShard": ("moe-tiny", {**MIXED, "router": "top-2"}, "feedForwardWidth", 2),
    "HASH": ("moe-tiny", {**MIXED, "router": "hash"}, "feedForwardWidth", 2),
    "BASE": ("moe-tiny", {**MIXED, "router": "base"}, "feedForwardWidth", 2),
    "sMLP, deterministic": ("smlp-tiny", SPARSE, "innerWidth", 2 * EXPERTS),
    "sMLP, partial": ("smlp-tiny", {**SPARSE, "spatialRouting": "partial"}, "innerWidth", 2 * EXPERTS),
    "sMLP, Switch's router": ("smlp-tiny", {**SPARSE, "router": "top-1"}, "innerWidth", 2 * EXPERTS),
}


def model_of(name: str, options: Options) -> dict[str, Any]:
    """As a recipe has it, with as many FLOPs as the dense Transformer whose inner width is four times its width."""
    target = resolve(ModelSpec(preset="gpt-tiny", overrides=_shape("gpt-tiny", options)))
    preset, overrides, width, multiple = MODELS[name]
    shape = {**_shape(preset, options), **overrides}

    def flops(value: int) -> float:
        return resolve(ModelSpec(preset=preset, overrides={**shape, width: value})).forward_flops_per_token(LENGTH)

    wanted = target.forward_flops_per_token(LENGTH)
    widths = range(multiple, 16 * options.width, multiple)
    best = min(widths, key=lambda value: abs(flops(value) - wanted))
    return {"preset": preset, "overrides": {**shape, width: best}}


def _shape(preset: str, options: Options) -> dict[str, Any]:
    shape = {
        "layers": options.layers, "width": options.width, "dropout": 0.0, "vocabularySize": VOCABULARY,
        "maximumPositions": LENGTH,
    }  # fmt: skip
    if preset in ("gpt-tiny", "moe-tiny"):
        shape |= {"heads": options.width // 32, "attentionDropout": 0.0}
    return shape


def recipe(options: Options, name: str, rate: float, seed: int, corpus: Path) -> Recipe:
    tokens = ROWS * LENGTH
    return Recipe.model_validate({
        "model": model_of(name, options),
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": rate, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "finalFraction": 0.0},
        "precision": "fp32",
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(options: Options, name: str, rate: float, seed: int, corpus: Path) -> Run:
    """One training: held-out loss at the end and on the way, in nats per token. Every router at evaluation: nothing
    dropped, BASE greedy, no position sees ahead."""
    spec = recipe(options, name, rate, seed, corpus)
    learner = learning.Learner(spec)
    set_share(learner.model, torch.ones((), device=learning.DEVICE))
    curve = []
    for step, _ in learner.steps():
        if step % (spec.total_steps // POINTS) == 0 and step < spec.total_steps:
            curve.append([step, learning.finite(learner.held_out(HELD_OUT_ON_THE_WAY), 4)])
    final = learning.finite(learner.held_out(HELD_OUT))
    curve.append([spec.total_steps, final])
    config = learner.config
    return {
        "heldOutLoss": final, "curve": curve,
        "forwardFlopsPerToken": config.forward_flops_per_token(LENGTH), **_parameters(config),
    }  # fmt: skip


def _parameters(config: ModelConfig) -> dict[str, int]:
    count = config.parameters()
    return {"parameters": count.total, "activated": count.activated}


def best_rate(options: Options, runs: Runs, name: str) -> float:
    return best(options.rates, lambda rate: runs[key(name, rate, TUNING)]["heldOutLoss"])


def measured(options: Options, runs: Runs, name: str) -> list[Run]:
    """At its own rate, by seed."""
    rate = best_rate(options, runs, name)
    return [runs[key(name, rate, seed)] for seed in seeds(options)]


def steps_to(curve: list[list[float]], target: float) -> float | None:
    """Steps until the loss is `target`, between two points on a line; None where it never is."""
    before: list[float] | None = None
    for point in curve:
        if point[1] <= target:
            if before is None:
                return point[0]
            return before[0] + (point[0] - before[0]) * (before[1] - target) / (before[1] - point[1])
        before = point
    return None


def table(options: Options, runs: Runs) -> list[str]:
    lines = [
        f"| held-out loss, seed {TUNING} | " + " | ".join(f"rate {rate:g}" for rate in options.rates) + " |",
        "|---" + "|--:" * len(options.rates) + "|",
    ]
    for name in MODELS:
        tried = [runs[key(name, rate, TUNING)]["heldOutLoss"] for rate in options.rates]
        lines.append(f"| {name} | {' | '.join('diverged' if loss is None else f'{loss:.3f}' for loss in tried)} |")
    lines += [
        "",
        "| model | rate | parameters | activated | MFLOP a token | held-out loss | less than dense, by seed | "
        "steps to dense's loss | s a run |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for name in MODELS:
        mine = measured(options, runs, name)
        dense = [one["heldOutLoss"] for one in measured(options, runs, DENSE)]
        losses = [one["heldOutLoss"] for one in mine]
        apart = ", ".join(f"{a - b:+.3f}" for a, b in zip(losses, dense, strict=True))
        reached = [steps_to(one["curve"], target) for one, target in zip(mine, dense, strict=True)]
        steps = ", ".join("never" if at is None else f"{at:.0f}" for at in reached)
        size = f"{mine[0]['parameters']:,} | {mine[0]['activated']:,} | {mine[0]['forwardFlopsPerToken'] / 1e6:.3f}"
        lines.append(
            f"| {name} | {best_rate(options, runs, name):g} | {size} | "
            f"{spread(losses)} | {apart} | {steps} | "
            f"{statistics.mean(one['seconds'] for one in mine):.0f} |"
        )
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    """Held-out loss over the run: means, and at the end a point per seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for place, name in enumerate(MODELS):
        mine = measured(options, runs, name)
        curves = [one["curve"] for one in mine]
        mean = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(curves[0]))]
        style = "-" if name.startswith("sMLP") else "--" if name.startswith("dense") else ":"
        left.plot([point[0] for point in curves[0]], mean, style, color=f"C{place}", label=name)
        ends = [one["heldOutLoss"] for one in mine]
        right.plot(ends, [place] * len(ends), "o", color=f"C{place}")
    left.set(xlabel="step", ylabel="held-out loss, nats a token")
    left.legend(fontsize=7)
    right.set(xlabel="held-out loss at the end, nats a token", yticks=range(len(MODELS)), yticklabels=list(MODELS))
    right.invert_yaxis()
    return figure


def key(name: str, rate: float, seed: int) -> str:
    return f"{name}; rate {rate:g}; seed {seed}"


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[Path], Run]]]:
    for name in MODELS:
        for rate in options.rates:
            yield key(name, rate, TUNING), partial(run, options, name, rate, TUNING)
    for seed in seeds(options):
        for name in MODELS:
            rate = best_rate(options, runs, name)
            yield key(name, rate, seed), partial(run, options, name, rate, seed)


PAPER = Miniature(
    __file__, __doc__,
    settings={"steps": 400, "layers": 4, "width": 64, "rates": [2.5e-3, 5e-3, 1e-2, 2e-2], "seeds": 3},
    quick={"steps": 10, "seeds": 1, "rates": [1e-2]},
    shape=lambda options: {name: getattr(options, name) for name in ("steps", "layers", "width")},
    corpus=english(VOCABULARY), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
