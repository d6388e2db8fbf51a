"""XLM-R XL and XXL (2105.00572) in miniature: does a larger encoder find more of what is hidden, in
every language?

    python benchmarks/papers/xlmr/run.py             # about a quarter of an hour on one idle core

Three sizes, the same masked tokens of the same eight languages (Debian's translated manual pages, temperature 0.3), the
same number of steps; judged by the loss of hidden tokens of held-out text. Each size has its own learning rate: of the
same few, the best on a seed that is not measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.families import build
from trireme_trainer.objectives.masked_lm import MaskedTokens
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.optimization.schedule import learning_rate
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.world import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import languages
from learning import DEVICE
from miniature import (
    TUNING,
    Miniature,
    Options,
    Run,
    Runs,
    best,
    eight_languages,
    main,
    seeds,
    spread,
)

VOCABULARY, LENGTH, ROWS = 512, 64, 16
HELD_OUT = 8192
"""Most tokens of a language that are looked at."""
SIZES = {"small": (2, 32), "middle": (2, 64), "large": (2, 128)}
"""Layers and width."""


def recipe(options: Options, size: str, rate: float, seed: int, corpora: dict[str, Path]) -> Recipe:
    layers, width = SIZES[size]
    tokens = ROWS * LENGTH
    shape = {
        "layers": layers, "width": width, "heads": width // 32, "dropout": 0.0, "attentionDropout": 0.0,
        "vocabularySize": VOCABULARY, "maximumPositions": LENGTH,
    }  # fmt: skip
    sources = [{"path": str(directory)} for directory in corpora.values()]
    return Recipe.model_validate({
        "model": {"preset": "xlmr-tiny", "overrides": shape},
        "objective": "masked-lm",
        "data": {"sources": sources, "mixture": {"alpha": 0.3}, "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": rate, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 1.0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "finalFraction": 0.0},
        "precision": "fp32",
        "evaluation": {"tokens": HELD_OUT, "sequences": 32},
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(options: Options, size: str, rate: float, seed: int, corpora: dict[str, Path]) -> Run:
    """One training, and at the end loss and perplexity of hidden tokens by language."""
    spec = recipe(options, size, rate, seed, corpora)
    config = check_recipe(spec)
    model = build(config).to(DEVICE)
    initialise(model, spec.seed)
    objective = MaskedTokens(spec, config, World(0, 1, 0, 1, DEVICE), None)
    optimizer = Optimizer(model, spec.optimizer)
    losses = []
    with objective.batches(0, 1, False) as batches:
        for step in range(spec.total_steps):
            (batch,) = batches.micro_batches(step)
            valid = (batch.targets >= 0).sum().to(DEVICE, torch.float32)
            losses.append(float(objective.learn(model, batch.on(DEVICE), valid, None, lambda: None)))
            norm = optimizer.clip()
            optimizer.step(learning_rate(spec, (step + 1) * spec.batch.tokens), (~torch.isfinite(norm)).float())
    found = objective.evaluate(model, lambda: None)["heldOut"]
    return {
        "languages": {
            row["language"]: {"tokens": row["tokens"], "loss": row["loss"], "perplexity": row["perplexity"]}
            for row in found if row["source"] is None
        },
        "losses": [round(x, 4) for x in losses[::10]], "parameters": config.parameters().total,
    }  # fmt: skip


def key(size: str, rate: float, seed: int) -> str:
    return f"{size}, {rate:g}, seed {seed}"


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[dict[str, Path]], Run]]]:
    for size in SIZES:
        for rate in options.rates:
            yield key(size, rate, TUNING), partial(run, options, size, rate, TUNING)
    for seed in seeds(options):
        for size in SIZES:
            rate = best_rate(options, runs, size)
            yield key(size, rate, seed), partial(run, options, size, rate, seed)


def losses(runs: Runs, size: str, rate: float, language: str, of: list[int]) -> list[float]:
    """By seed."""
    return [runs[key(size, rate, seed)]["languages"][language]["loss"] for seed in of]


def means(runs: Runs, size: str, rate: float, of: list[int]) -> list[float]:
    """Over languages, by seed."""
    by_language = [losses(runs, size, rate, language, of) for language in languages.LANGUAGES]
    return [statistics.mean(column) for column in zip(*by_language, strict=True)]


def best_rate(options: Options, runs: Runs, size: str) -> float:
    return best(options.rates, lambda rate: means(runs, size, rate, [TUNING])[0])


def ordered(by_size: list[list[float]]) -> int:
    """Seeds in which the loss falls from each size to the next."""
    return sum(all(a > b for a, b in pairwise(row)) for row in zip(*by_size, strict=True))


def table(options: Options, runs: Runs) -> list[str]:
    lines = [f"| mean over languages, seed {TUNING} | {' | '.join(SIZES)} |", f"|---|{'--:|' * len(SIZES)}"]
    for rate in options.rates:
        cells = [f"{means(runs, size, rate, [TUNING])[0]:.3f}" for size in SIZES]
        lines.append(f"| peak learning rate {rate:g} | {' | '.join(cells)} |")
    rates = {size: best_rate(options, runs, size) for size in SIZES}
    count = {size: runs[key(size, rate, 1)]["parameters"] for size, rate in rates.items()}
    head = " | ".join(f"{size}, {count[size]:,}, at {rate:g}" for size, rate in rates.items())
    lines += ["", f"| loss of hidden tokens | {head} | in order |", f"|---|{'--:|' * len(SIZES)}--:|"]
    of = seeds(options)
    for language in languages.LANGUAGES:
        by_size = [losses(runs, size, rates[size], language, of) for size in SIZES]
        lines.append(f"| {language} | {' | '.join(map(spread, by_size))} | {ordered(by_size)} of {len(of)} |")
    by_size = [means(runs, size, rates[size], of) for size in SIZES]
    lines.append(f"| mean over languages | {' | '.join(map(spread, by_size))} | {ordered(by_size)} of {len(of)} |")
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    rates = {size: best_rate(options, runs, size) for size in SIZES}
    sizes = [runs[key(size, rate, 1)]["parameters"] for size, rate in rates.items()]
    for number, language in enumerate(languages.LANGUAGES):
        found = [losses(runs, size, rate, language, seeds(options)) for size, rate in rates.items()]
        colour = f"C{number}"
        axes.plot(sizes, [statistics.mean(values) for values in found], color=colour, label=language)
        for size, values in zip(sizes, found, strict=True):
            axes.plot([size] * len(values), values, "o", color=colour, alpha=0.5)
    axes.set(xscale="log", xlabel="parameters, each size at its best rate", ylabel="loss of hidden tokens, nats")
    axes.legend(ncols=2, fontsize="small")
    return figure


PAPER = Miniature(
    __file__, __doc__,
    settings={"steps": 1200, "seeds": 3, "rates": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]},
    quick={"steps": 10, "seeds": 1, "rates": [2e-3]},
    shape=lambda options: {"steps": options.steps},
    corpus=eight_languages(VOCABULARY), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
