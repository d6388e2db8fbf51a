"""NormFormer (2110.09456) in miniature: against the pre-LN baseline at each learning rate and at each one's best, and
how far the gradients of early and late layers are apart.

    python benchmarks/papers/normformer/run.py             # about seven minutes on one idle core
    python benchmarks/papers/normformer/run.py --steps 2000 --layers 12 --width 256   # where there is a GPU or time

Both start from the same initial values where they have the same parameters, see the same batches, and are judged on the
same held-out text. Each finished run is written at once; started again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from trireme_api.recipe import Recipe
from trireme_trainer.families import LanguageModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import learning  # noqa: E402
import processes  # noqa: E402
import text  # noqa: E402

VOCABULARY, LENGTH, ROWS = 512, 64, 16
OFF = {"postAttentionNorm": False, "headScale": "none", "innerNorm": False, "residualScale": False}
MODELS: dict[str, dict[str, Any]] = {"pre-LN": OFF, "NormFormer": {}}
RATES = [3e-3, 1e-2, 3e-2]
HELD_OUT = 128
"""Blocks of held-out text."""


def recipe(corpus: Path, model: str, rate: float, seed: int, options: argparse.Namespace) -> Recipe:
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


def run(spec: Recipe, device: torch.device) -> dict[str, Any]:
    """One training: held-out loss at the end (infinite where it diverged) and the gradients' ratio on the way."""
    began = time.perf_counter()
    learner = learning.Learner(spec, device)
    ratios: list[float] = []

    def look(step: int) -> None:
        if step % 10 == 0:
            ratios.append(early_to_late(learner.model))

    losses = [loss for _, loss in learner.steps(look)]
    loss = learner.held_out(HELD_OUT)
    return {
        "heldOutLoss": loss if math.isfinite(loss) else None, "losses": [round(x, 4) for x in losses[::10]],
        "ratios": [round(x, 4) for x in ratios], "parameters": learner.config.parameters().total,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def early_to_late(model: LanguageModel) -> float:
    """Mean absolute gradient of the feed-forward layers' second matrices (what the paper plots, as L1 norms): first
    quarter of the layers over the last."""
    sizes = [float(block.feed_forward.fc2.weight.grad.abs().mean()) for block in model.blocks]
    part = max(1, len(sizes) // 4)
    return sum(sizes[:part]) / max(sum(sizes[-part:]), 1e-30)


def summary(runs: dict[str, dict[str, Any]], rates: list[float], seeds: list[int]) -> list[str]:
    def losses(model: str, rate: float) -> list[float]:
        return [runs[key(model, rate, seed)]["heldOutLoss"] or math.inf for seed in seeds]

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

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
            middle = [statistics.median(runs[key(model, rate, seed)]["ratios"]) for seed in seeds]
            cells.append(f"{statistics.mean(middle):.2f} ({min(middle):.2f} to {max(middle):.2f})")
        lines.append(f"| peak learning rate {rate:g} | {' | '.join(cells)} |")
    return lines


def plot(runs: dict[str, dict[str, Any]], rates: list[float], seeds: list[int], path: Path) -> None:
    """Held-out loss over the peak learning rate, and the gradients' ratio over the run; a point or line per seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for model, colour in zip(MODELS, ("tab:gray", "tab:blue"), strict=True):
        means = [statistics.mean(runs[key(model, r, s)]["heldOutLoss"] or math.nan for s in seeds) for r in rates]
        left.plot(rates, means, color=colour, label=model)
        middle = rates[len(rates) // 2]
        for seed in seeds:
            points = [runs[key(model, rate, seed)]["heldOutLoss"] or math.nan for rate in rates]
            left.plot(rates, points, "o", color=colour, alpha=0.5)
            ratios = runs[key(model, middle, seed)]["ratios"]
            right.plot([10 * (i + 1) for i in range(len(ratios))], ratios, color=colour, alpha=0.7)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats a token")
    left.legend()
    right.set(xlabel="step", ylabel=f"gradients, early over late (at {middle:g})")
    right.axhline(1.0, color="black", linewidth=0.5)
    figure.savefig(path, metadata={"Date": None})


def key(model: str, rate: float, seed: int) -> str:
    return f"{model} {rate:g} {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="peak learning rates")
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    shape = {name: getattr(options, name) for name in ("steps", "layers", "width")}
    result: dict[str, Any] = {"machine": processes.machine(), "text": text.name(), "shape": shape, "runs": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if known["shape"] == shape and known["text"] == result["text"]:
            result = known
    with tempfile.TemporaryDirectory(prefix="normformer-") as directory:
        corpus = text.make_corpus(options.work or Path(directory), VOCABULARY)
        seeds = list(range(1, options.seeds + 1))
        for seed in seeds:
            for rate in options.rates:
                for model in MODELS:
                    name = key(model, rate, seed)
                    if name in result["runs"]:
                        continue
                    result["runs"][name] = run(recipe(corpus, model, rate, seed, options), device)
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
                    told = result["runs"][name]
                    print(f"{name}: {told['heldOutLoss']} after {told['seconds']} s", flush=True)
    print("\n".join(summary(result["runs"], options.rates, seeds)))
    plot(result["runs"], options.rates, seeds, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
