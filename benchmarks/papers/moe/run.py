"""Mixtures of experts (2112.10684) in miniature: training FLOPs to reach a loss, dense against top-2 mixtures.

    python benchmarks/papers/moe/run.py             # some minutes on one idle core
    python benchmarks/papers/moe/run.py --steps 4000 --layers 6 --width 256   # where there is time

Same width, layers, batches and settings; every second block of a mixture has experts of the dense layer's size. The
learning rate stays constant after warm-up, so that each point of a curve is a model one could have stopped at. Each
finished run is written at once; started again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from trireme_api.recipe import Recipe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import learning  # noqa: E402
import processes  # noqa: E402
import text  # noqa: E402

VOCABULARY, LENGTH, ROWS = 512, 64, 16
HELD_OUT, PROBE = 64, 10
"""Blocks of held-out text; steps between measurements."""
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"preset": "gpt-tiny"},
    "8 experts": {"preset": "moe-tiny", "experts": 8},
}
COLOURS = {"dense": "tab:gray", "8 experts": "tab:blue"}
Runs = dict[str, dict[str, Any]]


def recipe(corpus: Path, model: str, seed: int, options: argparse.Namespace) -> Recipe:
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
        "optimizer": {"learningRate": options.rate, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 1.0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "decay": "constant"},
        "precision": "fp32",
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def key(model: str, seed: int) -> str:
    return f"{model}; seed {seed}"


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


def summary(runs: Runs, seeds: list[int]) -> list[str]:
    lines = [
        "| model | parameters | activated | MFLOP a token | held-out loss at the end | by seed |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for model in MODELS:
        row = runs[key(model, seeds[0])]
        ends = [curve(runs[key(model, seed)])[-1][1] for seed in seeds]
        lines.append(
            f"| {model} | {row['parameters']:,} | {row['activated']:,} | {row['flopsPerToken'] / 1e6:.2f} "
            f"| {statistics.mean(ends):.3f} | {', '.join(f'{loss:.3f}' for loss in ends)} |"
        )
    lines += ["", f"| GFLOP to the loss that dense has after | {' | '.join(MODELS)} | dense over mixture, by seed |"]
    lines.append("|---" + "|--:" * len(MODELS) + "|---|")
    for share in (0.5, 0.75, 1.0):
        spent: dict[str, list[float | None]] = {model: [] for model in MODELS}
        for seed in seeds:
            dense = curve(runs[key("dense", seed)])
            target = dense[round(share * len(dense)) - 1][1]
            for model in MODELS:
                spent[model].append(reached(curve(runs[key(model, seed)]), target))
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


def plot(runs: Runs, seeds: list[int], path: Path) -> None:
    """Held-out loss over training FLOPs, a line per seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for model in MODELS:
        for number, seed in enumerate(seeds):
            spent, losses = zip(*curve(runs[key(model, seed)]), strict=True)
            axes.plot(spent, losses, color=COLOURS[model], alpha=0.8, label="" if number else model)
    axes.set(xscale="log", xlabel="training GFLOP", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate after warm-up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {name: getattr(options, name) for name in ("steps", "layers", "width", "rate")}
    result: dict[str, Any] = {"machine": processes.machine(), "text": text.name(), "shape": shape, "runs": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if (known["shape"], known["text"]) == (shape, result["text"]):
            result = known
    seeds = list(range(1, options.seeds + 1))
    with tempfile.TemporaryDirectory(prefix="moe-") as directory:
        corpus = text.make_corpus(options.work or Path(directory), VOCABULARY)
        for seed in seeds:
            for model in MODELS:
                name = key(model, seed)
                if name in result["runs"]:
                    continue
                probes = range(PROBE, options.steps + 1, PROBE)
                result["runs"][name] = learning.learn(recipe(corpus, model, seed, options), probes, HELD_OUT)
                options.output.write_text(json.dumps(result, indent=1) + "\n")
                row = result["runs"][name]
                print(f"{name}: {row['heldOutLosses'][-1]} after {row['seconds']} s", flush=True)
    print("\n".join(summary(result["runs"], seeds)))
    plot(result["runs"], seeds, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
