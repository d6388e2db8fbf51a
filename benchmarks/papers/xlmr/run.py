"""XLM-R XL and XXL (2105.00572) in miniature: does a larger encoder find more of what is hidden, in
every language?

    python benchmarks/papers/xlmr/run.py             # a few minutes on one idle core

Three sizes at three learning rates, the same masked tokens of the same eight languages (Debian's translated manual
pages, temperature 0.3), the same number of steps; judged by the perplexity of hidden tokens of held-out text. Each
finished run is written at once; started again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.families import build
from trireme_trainer.objectives.masked_lm import MaskedTokens
from trireme_trainer.optim import Optimizer
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.world import World
from trireme_trainer.schedule import learning_rate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import languages  # noqa: E402
import processes  # noqa: E402

VOCABULARY, LENGTH, ROWS = 2048, 64, 16
HELD_OUT = 8192
"""Most tokens of a language that are looked at."""
RATES = [1e-3, 2e-3, 5e-3]
SIZES = {"small": (2, 32), "middle": (2, 64), "large": (4, 96)}
"""Layers and width."""


def recipe(corpora: dict[str, Path], size: str, seed: int, steps: int, rate: float) -> Recipe:
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
        "schedule": {"warmupTokens": steps // 10 * tokens, "finalFraction": 0.0},
        "precision": "fp32",
        "evaluation": {"tokens": HELD_OUT, "sequences": 32},
        "until": {"steps": steps},
        "seed": seed,
    })  # fmt: skip


def run(spec: Recipe, device: torch.device) -> dict[str, Any]:
    """One training, and at the end loss and perplexity of hidden tokens by language."""
    began = time.perf_counter()
    config = check_recipe(spec)
    model = build(config).to(device)
    initialise(model, spec.seed)
    objective = MaskedTokens(spec, config, World(0, 1, 0, 1, device), None)
    optimizer = Optimizer(model, spec.optimizer)
    losses = []
    with objective.batches(0, 1, False) as batches:
        for step in range(spec.total_steps):
            (batch,) = batches.micro_batches(step)
            valid = (batch.targets >= 0).sum().to(device, torch.float32)
            losses.append(float(objective.learn(model, batch.on(device), valid, None, lambda: None)))
            norm = optimizer.clip()
            optimizer.step(learning_rate(spec, (step + 1) * spec.batch.tokens), (~torch.isfinite(norm)).float())
    found = objective.evaluate(model, lambda: None)["heldOut"]
    return {
        "languages": {
            row["language"]: {"tokens": row["tokens"], "loss": row["loss"], "perplexity": row["perplexity"]}
            for row in found if row["source"] is None
        },
        "losses": [round(x, 4) for x in losses[::10]], "parameters": config.parameters().total,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def key(size: str, rate: float, seed: int) -> str:
    return f"{size}, {rate:g}, seed {seed}"


Runs = dict[str, dict[str, Any]]


def losses_of(runs: Runs, size: str, rate: float, language: str, seeds: list[int]) -> list[float]:
    return [runs[key(size, rate, seed)]["languages"][language]["loss"] for seed in seeds]


def best_rate(runs: Runs, size: str, rates: list[float], seeds: list[int]) -> float:
    """Of the lowest mean over languages and seeds."""

    def mean(rate: float) -> float:
        return statistics.mean(
            statistics.mean(losses_of(runs, size, rate, language, seeds)) for language in languages.LANGUAGES
        )

    return min(rates, key=mean)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def summary(runs: Runs, rates: list[float], seeds: list[int]) -> list[str]:
    head = " | ".join(f"{size}, {runs[key(size, rates[0], seeds[0])]['parameters']:,}" for size in SIZES)
    lines = [f"| mean over languages, peak learning rate | {head} |", f"|---|{'--:|' * len(SIZES)}"]
    for rate in rates:
        cells = []
        for size in SIZES:
            by_language = [losses_of(runs, size, rate, language, seeds) for language in languages.LANGUAGES]
            cells.append(spread([statistics.mean(column) for column in zip(*by_language, strict=True)]))
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    best = {size: best_rate(runs, size, rates, seeds) for size in SIZES}
    head = " | ".join(f"{size}, at {best[size]:g}" for size in SIZES)
    lines += ["", f"| each at its best rate | {head} | in order |", f"|---|{'--:|' * len(SIZES)}--:|"]
    for language in languages.LANGUAGES:
        by_size = [losses_of(runs, size, best[size], language, seeds) for size in SIZES]
        ordered = sum(all(a > b for a, b in pairwise(row)) for row in zip(*by_size, strict=True))
        lines.append(f"| {language} | {' | '.join(map(spread, by_size))} | {ordered} of {len(seeds)} |")
    return lines


def plot(runs: Runs, rates: list[float], seeds: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "xlmr"
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    sizes = [runs[key(size, rates[0], seeds[0])]["parameters"] for size in SIZES]
    for number, language in enumerate(languages.LANGUAGES):
        found = [losses_of(runs, size, best_rate(runs, size, rates, seeds), language, seeds) for size in SIZES]
        colour = f"C{number}"
        axes.plot(sizes, [statistics.mean(values) for values in found], color=colour, label=language)
        for size, values in zip(sizes, found, strict=True):
            axes.plot([size] * len(values), values, "o", color=colour, alpha=0.5)
    axes.set(xscale="log", xlabel="parameters, each size at its best rate", ylabel="loss of hidden tokens, nats")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak learning rates")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    shape = {"steps": options.steps}
    with tempfile.TemporaryDirectory(prefix="xlmr-") as directory:
        corpora, packages = languages.make_corpora(options.work or Path(directory), VOCABULARY)
        result: dict[str, Any] = {"machine": processes.machine(), "text": packages, "shape": shape, "runs": {}}
        if options.output.exists():
            known = json.loads(options.output.read_text())
            if known["shape"] == shape and known["text"] == packages:
                result = known
        seeds = list(range(1, options.seeds + 1))
        for seed in seeds:
            for rate in options.rates:
                for size in SIZES:
                    name = key(size, rate, seed)
                    if name in result["runs"]:
                        continue
                    result["runs"][name] = run(recipe(corpora, size, seed, options.steps, rate), device)
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
                    print(f"{name}: {result['runs'][name]['seconds']} s", flush=True)
    print("\n".join(summary(result["runs"], options.rates, seeds)))
    plot(result["runs"], options.rates, seeds, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
