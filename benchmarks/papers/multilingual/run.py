"""XGLM's and XLM-R's mixtures in miniature: perplexity by language where there is forty times as much text of one as of
another.

    python benchmarks/papers/multilingual/run.py             # a few minutes on one idle core

Real text: Debian's translated manual pages in eight languages, one SentencePiece model for all. Three mixtures, the
same model and number of tokens: as much as there is of each language, XLM-R's temperature, and factors as XGLM's. Each
finished run is written at once; started again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from trireme_api.recipe import Recipe
from trireme_trainer.evaluation.training import during_training
from trireme_trainer.parallel.world import World

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import languages  # noqa: E402
import learning  # noqa: E402
import processes  # noqa: E402

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


def recipe(corpora: dict[str, Path], mixture: str, seed: int, options: argparse.Namespace) -> Recipe:
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


def run(spec: Recipe, device: torch.device) -> dict[str, Any]:
    """One training: shares and epochs, and at the end bits per byte and perplexity by language."""
    began = time.perf_counter()
    learner = learning.Learner(spec, device)
    mixture = learner.mixture
    suite = during_training(spec, learner.config, mixture.directories)
    losses = [loss for _, loss in learner.steps()]
    found = suite.run(learner.model, World(0, 1, 0, 1, device))["heldOut"]
    by_language = {row["language"]: row for row in found if row["source"] is None}
    told = {row["language"]: row for row in mixture.told(spec.total_steps * ROWS)}
    return {
        "languages": {
            name: {
                "share": told[name]["share"], "epochs": told[name]["epochs"], "tokens": told[name]["tokens"],
                "heldOutTokens": row["tokens"], "perplexity": row["perplexity"], "bitsPerByte": row["bitsPerByte"],
            }
            for name, row in by_language.items()
        },
        "losses": [round(x, 4) for x in losses[::10]], "parameters": learner.config.parameters().total,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def key(mixture: str, seed: int) -> str:
    return f"{mixture}, seed {seed}"


def cell(runs: dict[str, dict[str, Any]], mixture: str, language: str, seeds: list[int]) -> str:
    found = [runs[key(mixture, seed)]["languages"][language] for seed in seeds]
    bits = [one["bitsPerByte"] for one in found]
    return f"{statistics.mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})"


def summary(runs: dict[str, dict[str, Any]], seeds: list[int]) -> list[str]:
    head = " | ".join(f"{name}: share, epochs | bits per byte" for name in MIXTURES)
    lines = [f"| | training tokens | {head} |", f"|---|--:|{'--:|--:|' * len(MIXTURES)}"]
    for language in languages.LANGUAGES:
        cells = []
        for mixture in MIXTURES:
            one = runs[key(mixture, seeds[0])]["languages"][language]
            cells += [f"{one['share']:.3f}, {one['epochs']:.2f}", cell(runs, mixture, language, seeds)]
        tokens = runs[key("as they come", seeds[0])]["languages"][language]["tokens"]
        lines.append(f"| {language} | {tokens:,} | {' | '.join(cells)} |")
    for name, group in (("mean of the four with much", MUCH), ("mean of the four with little", ())):
        chosen = group or tuple(language for language in languages.LANGUAGES if language not in MUCH)
        cells = []
        for mixture in MIXTURES:
            means = [
                statistics.mean(runs[key(mixture, seed)]["languages"][one]["bitsPerByte"] for one in chosen)
                for seed in seeds
            ]
            cells += ["", f"{statistics.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})"]
        lines.append(f"| {name} | | {' | '.join(cells)} |")
    return lines


def plot(runs: dict[str, dict[str, Any]], seeds: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "multilingual"
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    places = range(len(languages.LANGUAGES))
    for mixture, colour in zip(MIXTURES, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        by_seed = [
            [runs[key(mixture, seed)]["languages"][name]["bitsPerByte"] for name in languages.LANGUAGES]
            for seed in seeds
        ]
        axes.plot(places, [statistics.mean(column) for column in zip(*by_seed, strict=True)], "-", color=colour)
        for number, values in enumerate(by_seed):
            axes.plot(places, values, "o", color=colour, alpha=0.5, label=None if number else mixture)
    axes.set_xticks(list(places), languages.LANGUAGES)
    axes.set(xlabel="language, from most text to least", ylabel="held-out bits per byte")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    shape = {name: getattr(options, name) for name in ("steps", "layers", "width")}
    with tempfile.TemporaryDirectory(prefix="multilingual-") as directory:
        corpora, packages = languages.make_corpora(options.work or Path(directory), VOCABULARY)
        result: dict[str, Any] = {"machine": processes.machine(), "text": packages, "shape": shape, "runs": {}}
        if options.output.exists():
            known = json.loads(options.output.read_text())
            if known["shape"] == shape and known["text"] == packages:
                result = known
        seeds = list(range(1, options.seeds + 1))
        for seed in seeds:
            for mixture in MIXTURES:
                name = key(mixture, seed)
                if name in result["runs"]:
                    continue
                result["runs"][name] = run(recipe(corpora, mixture, seed, options), device)
                options.output.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{name}: {result['runs'][name]['seconds']} s", flush=True)
    print("\n".join(summary(result["runs"], seeds)))
    plot(result["runs"], seeds, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
