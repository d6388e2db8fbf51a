"""XGLM's and XLM-R's mixtures in miniature: perplexity by language where there is forty times as much text of one as of
another.

    python benchmarks/papers/multilingual/run.py             # a few minutes on one idle core

Real text: Debian's translated manual pages in eight languages, one SentencePiece model for all. Three mixtures, the
same model and number of tokens: as much as there is of each language, XLM-R's temperature, and factors as XGLM's.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from trireme_api.recipe import Recipe
from trireme_trainer.evaluation.training import during_training
from trireme_trainer.parallel.world import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import languages
import learning
from miniature import Miniature, Options, Run, Runs, eight_languages, main, seeds, spread

VOCABULARY, LENGTH, ROWS = 2048, 64, 16
HELD_OUT = 8192
"""Most tokens of a language that are looked at."""
MIXTURES: dict[str, dict[str, Any]] = {
    "as they come": {"alpha": 1.0},
    "temperature 0.3": {"alpha": 0.3},
    "factors": {"upsample": {"nl": 2, "fi": 10, "ro": 10, "mk": 100}},
}
"""Factors of XGLM's steps: the less text, the higher."""
MUCH = ("de", "fr", "ru", "es")


def recipe(options: Options, mixture: str, seed: int, corpora: dict[str, Path]) -> Recipe:
    tokens = ROWS * LENGTH
    shape = {
        "layers": options.layers, "width": options.width, "heads": options.width // 32, "dropout": 0.0,
        "attentionDropout": 0.0, "vocabularySize": VOCABULARY, "maximumPositions": LENGTH,
    }  # fmt: skip
    sources = [{"path": str(directory)} for directory in corpora.values()]
    return Recipe.model_validate({
        "model": {"preset": "xglm-tiny", "overrides": shape},
        "data": {"sources": sources, "mixture": MIXTURES[mixture], "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": 5e-3, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 1.0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "finalFraction": 0.0},
        "precision": "fp32",
        "evaluation": {"tokens": HELD_OUT, "sequences": 32},
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(options: Options, mixture: str, seed: int, corpora: dict[str, Path]) -> Run:
    """One training: shares and epochs, and at the end bits per byte and perplexity by language."""
    spec = recipe(options, mixture, seed, corpora)
    learner = learning.Learner(spec)
    suite = during_training(spec, learner.config, learner.mixture.directories)
    losses = [loss for _, loss in learner.steps()]
    found = suite.run(learner.model, World(0, 1, 0, 1, learning.DEVICE))["heldOut"]
    by_language = {row["language"]: row for row in found if row["source"] is None}
    told = {row["language"]: row for row in learner.mixture.told(spec.total_steps * ROWS)}
    return {
        "languages": {
            name: {
                "share": told[name]["share"], "epochs": told[name]["epochs"], "tokens": told[name]["tokens"],
                "heldOutTokens": row["tokens"], "perplexity": row["perplexity"], "bitsPerByte": row["bitsPerByte"],
            }
            for name, row in by_language.items()
        },
        "losses": [round(x, 4) for x in losses[::10]], "parameters": learner.config.parameters().total,
    }  # fmt: skip


def key(mixture: str, seed: int) -> str:
    return f"{mixture}, seed {seed}"


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[dict[str, Path]], Run]]]:
    for seed in seeds(options):
        for mixture in MIXTURES:
            yield key(mixture, seed), partial(run, options, mixture, seed)


def table(options: Options, runs: Runs) -> list[str]:
    def bits(mixture: str, seed: int, language: str) -> float:
        return float(runs[key(mixture, seed)]["languages"][language]["bitsPerByte"])

    head = " | ".join(f"{name}: share, epochs | bits per byte" for name in MIXTURES)
    lines = [f"| | training tokens | {head} |", f"|---|--:|{'--:|--:|' * len(MIXTURES)}"]
    for language in languages.LANGUAGES:
        cells = []
        for mixture in MIXTURES:
            one = runs[key(mixture, 1)]["languages"][language]
            found = [bits(mixture, seed, language) for seed in seeds(options)]
            cells += [f"{one['share']:.3f}, {one['epochs']:.2f}", spread(found)]
        tokens = runs[key("as they come", 1)]["languages"][language]["tokens"]
        lines.append(f"| {language} | {tokens:,} | {' | '.join(cells)} |")
    for name, group in (("mean of the four with much", MUCH), ("mean of the four with little", ())):
        chosen = group or tuple(language for language in languages.LANGUAGES if language not in MUCH)
        cells = []
        for mixture in MIXTURES:
            means = [statistics.mean(bits(mixture, seed, one) for one in chosen) for seed in seeds(options)]
            cells += ["", spread(means)]
        lines.append(f"| {name} | | {' | '.join(cells)} |")
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    places = range(len(languages.LANGUAGES))
    for mixture, colour in zip(MIXTURES, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        by_seed = [
            [runs[key(mixture, seed)]["languages"][name]["bitsPerByte"] for name in languages.LANGUAGES]
            for seed in seeds(options)
        ]
        axes.plot(places, [statistics.mean(column) for column in zip(*by_seed, strict=True)], "-", color=colour)
        for number, values in enumerate(by_seed):
            axes.plot(places, values, "o", color=colour, alpha=0.5, label=None if number else mixture)
    axes.set_xticks(list(places), languages.LANGUAGES)
    axes.set(xlabel="language, from most text to least", ylabel="held-out bits per byte")
    axes.legend()
    return figure


PAPER = Miniature(
    __file__, __doc__,
    settings={"steps": 200, "layers": 2, "width": 64, "seeds": 3},
    quick={"steps": 10, "seeds": 1},
    shape=lambda options: {name: getattr(options, name) for name in ("steps", "layers", "width")},
    corpus=eight_languages(VOCABULARY), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
