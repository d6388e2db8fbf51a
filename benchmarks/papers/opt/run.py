"""OPT (2205.01068) in miniature: does the loss fall with size, at equal tokens? Four sizes, the same text, seeds.

    python benchmarks/papers/opt/run.py             # some minutes on one idle core
    python benchmarks/papers/opt/run.py --steps 2000 --widths 64 128 256 512   # where there is time

All sizes of a seed see the same batches and are judged on the same held-out text. Each finished run is written at once;
started again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import learning  # noqa: E402
import processes  # noqa: E402
import text  # noqa: E402

VOCABULARY, LENGTH, ROWS, LAYERS = 512, 64, 16, 2
WIDTHS = [8, 16, 32, 64]
HELD_OUT = 128
"""Blocks of held-out text."""
Runs = dict[str, dict[str, Any]]
Points = list[tuple[int, list[float]]]


def recipe(corpus: Path, width: int, rate: float, seed: int, steps: int) -> Recipe:
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
        "schedule": {"warmupTokens": steps // 10 * tokens},
        "precision": "fp32",
        "until": {"steps": steps},
        "seed": seed,
    })  # fmt: skip


def key(width: int, rate: float, seed: int) -> str:
    return f"width {width}; rate {rate:g}; seed {seed}"


def fit(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    """ln loss = a − b ln N, least squares: (e^a, b, R²)."""
    x, y = np.log(sizes), np.log(losses)
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    return math.exp(intercept), -float(slope), 1 - float(left.var() / y.var())


def table(runs: Runs, widths: list[int], rates: list[float], seeds: list[int]) -> tuple[list[str], Points]:
    """Lines, and (parameters of the blocks, losses by seed) of each size at its best rate."""
    lines = [
        "| width | parameters | of them in blocks | MFLOP a token | best rate | held-out loss | by seed |",
        "|--:|--:|--:|--:|--:|--:|---|",
    ]
    points: Points = []
    for width in widths:
        def losses(rate: float, width: int = width) -> list[float]:
            return [runs[key(width, rate, seed)]["heldOutLosses"][-1] or math.inf for seed in seeds]

        rate = min(rates, key=lambda rate: statistics.mean(losses(rate)))
        row = runs[key(width, rate, seeds[0])]
        found = losses(rate)
        points.append((row["blockParameters"], found))
        lines.append(
            f"| {width} | {row['parameters']:,} | {row['blockParameters']:,} | {row['flopsPerToken'] / 1e6:.2f} "
            f"| {rate:g} | {statistics.mean(found):.3f} | {', '.join(f'{loss:.3f}' for loss in found)} |"
        )
    return lines, points


def plot(points: Points, path: Path) -> None:
    """Held-out loss over the blocks' parameters, both logarithmic; a point per seed and the fitted line."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    sizes = [size for size, _ in points]
    scale, slope, _ = fit(sizes, [statistics.mean(found) for _, found in points])
    axes.plot(sizes, [scale * size**-slope for size in sizes], color="black", label=f"{scale:.2f} · N^-{slope:.3f}")
    for size, found in points:
        axes.plot([size] * len(found), found, "o", color="tab:blue", alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="parameters of the blocks, N", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-2], help="peak learning rates tried")
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"steps": options.steps, "layers": LAYERS, "tokens": options.steps * ROWS * LENGTH}
    result: dict[str, Any] = {"machine": processes.machine(), "text": text.name(), "shape": shape, "runs": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if (known["shape"], known["text"]) == (shape, result["text"]):
            result = known
    seeds = list(range(1, options.seeds + 1))
    with tempfile.TemporaryDirectory(prefix="opt-") as directory:
        corpus = text.make_corpus(options.work or Path(directory), VOCABULARY)
        for seed in seeds:
            for width in options.widths:
                for rate in options.rates:
                    name = key(width, rate, seed)
                    if name in result["runs"]:
                        continue
                    spec = recipe(corpus, width, rate, seed, options.steps)
                    config = check_recipe(spec)
                    found = learning.learn(spec, [options.steps], HELD_OUT)
                    result["runs"][name] = {**found, "blockParameters": config.layers * config.block_parameters()}
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
                    print(f"{name}: {found['heldOutLosses']} after {found['seconds']} s", flush=True)
    lines, points = table(result["runs"], options.widths, options.rates, seeds)
    print("\n".join(lines))
    for number, seed in enumerate([*seeds, "mean"]):
        losses = [found[number] if seed != "mean" else statistics.mean(found) for _, found in points]
        scale, slope, share = fit([size for size, _ in points], losses)
        falls = all(b < a for a, b in itertools.pairwise(losses))
        print(f"seed {seed}: {scale:.3f} N^-{slope:.4f}, R² {share:.3f}, falls from each size to the next: {falls}")
    plot(points, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
