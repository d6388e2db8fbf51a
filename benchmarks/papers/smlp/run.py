"""Sparse all-MLP (2203.06850) in miniature: against dense models and Transformer mixtures at equal FLOPs per token.

    python benchmarks/papers/smlp/run.py             # minutes on one idle core
    python benchmarks/papers/smlp/run.py --steps 2000 --layers 12 --width 256   # where there is a GPU or time

All have the same width, number of blocks, batches and learning rate; one inner width of each is set so that a token
costs as many forward FLOPs as in the dense Transformer. Each finished run is written at once; started again, it goes on
with those that are missing.
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
from trireme_api.families import ModelConfig, resolve
from trireme_api.recipe import ModelSpec, Recipe
from trireme_trainer.layers.auxiliary import set_share

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import learning  # noqa: E402
import processes  # noqa: E402
import text  # noqa: E402

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
}


def model_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
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


def _shape(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    shape = {
        "layers": options.layers, "width": options.width, "dropout": 0.0, "vocabularySize": VOCABULARY,
        "maximumPositions": LENGTH,
    }  # fmt: skip
    if preset in ("gpt-tiny", "moe-tiny"):
        shape |= {"heads": options.width // 32, "attentionDropout": 0.0}
    return shape


def recipe(corpus: Path, name: str, seed: int, options: argparse.Namespace) -> Recipe:
    tokens = ROWS * LENGTH
    return Recipe.model_validate({
        "model": model_of(name, options),
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": LENGTH},
        "batch": {"tokens": tokens, "micro": ROWS},
        "optimizer": {"learningRate": options.rate, "betas": [0.9, 0.98], "weightDecay": 0.01, "clip": 0},
        "schedule": {"warmupTokens": options.steps // 10 * tokens, "finalFraction": 0.0},
        "precision": "fp32",
        "until": {"steps": options.steps},
        "seed": seed,
    })  # fmt: skip


def run(spec: Recipe, device: torch.device) -> dict[str, Any]:
    """One training: held-out loss at the end and on the way, in nats per token. Every router at evaluation: nothing
    dropped, BASE greedy, no position sees ahead."""
    began = time.perf_counter()
    learner = learning.Learner(spec, device)
    set_share(learner.model, torch.ones((), device=device))
    curve = []
    for step, _ in learner.steps():
        if step % (spec.total_steps // POINTS) == 0 and step < spec.total_steps:
            curve.append([step, round(learner.held_out(HELD_OUT_ON_THE_WAY), 4)])
    final = learner.held_out(HELD_OUT)
    curve.append([spec.total_steps, round(final, 4)])
    config = learner.config
    return {
        "heldOutLoss": final, "curve": curve, "seconds": round(time.perf_counter() - began, 1),
        "forwardFlopsPerToken": config.forward_flops_per_token(LENGTH), **_parameters(config),
    }  # fmt: skip


def _parameters(config: ModelConfig) -> dict[str, int]:
    count = config.parameters()
    return {"parameters": count.total, "activated": count.activated}


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


def summary(runs: dict[str, dict[str, Any]], seeds: list[int]) -> list[str]:
    lines = [
        "| model | parameters | activated | MFLOP a token | held-out loss | less than dense, by seed | "
        "steps to dense's loss | s a run |",
        "|---|--:|--:|--:|--:|---|--:|--:|",
    ]
    for name in MODELS:
        mine = [runs[key(name, seed)] for seed in seeds]
        dense = [runs[key(DENSE, seed)]["heldOutLoss"] for seed in seeds]
        losses = [one["heldOutLoss"] for one in mine]
        apart = ", ".join(f"{a - b:+.3f}" for a, b in zip(losses, dense, strict=True))
        reached = [steps_to(one["curve"], target) for one, target in zip(mine, dense, strict=True)]
        steps = ", ".join("never" if at is None else f"{at:.0f}" for at in reached)
        size = f"{mine[0]['parameters']:,} | {mine[0]['activated']:,} | {mine[0]['forwardFlopsPerToken'] / 1e6:.3f}"
        lines.append(
            f"| {name} | {size} | "
            f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | {apart} | {steps} | "
            f"{statistics.mean(one['seconds'] for one in mine):.0f} |"
        )
    return lines


def plot(runs: dict[str, dict[str, Any]], seeds: list[int], path: Path) -> None:
    """Held-out loss over the run: means, and at the end a point per seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for place, name in enumerate(MODELS):
        curves = [runs[key(name, seed)]["curve"] for seed in seeds]
        mean = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(curves[0]))]
        style = "-" if name.startswith("sMLP") else "--" if name.startswith("dense") else ":"
        left.plot([point[0] for point in curves[0]], mean, style, color=f"C{place}", label=name)
        right.plot([runs[key(name, s)]["heldOutLoss"] for s in seeds], [place] * len(seeds), "o", color=f"C{place}")
    left.set(xlabel="step", ylabel="held-out loss, nats a token")
    left.legend(fontsize=7)
    right.set(xlabel="held-out loss at the end, nats a token", yticks=range(len(MODELS)), yticklabels=list(MODELS))
    right.invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


def key(name: str, seed: int) -> str:
    return f"{name} {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-2, help="peak learning rate of all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    shape = {name: getattr(options, name) for name in ("steps", "layers", "width", "rate")}
    result: dict[str, Any] = {"machine": processes.machine(), "text": text.name(), "shape": shape, "runs": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if known["shape"] == shape and known["text"] == result["text"]:
            result = known
    with tempfile.TemporaryDirectory(prefix="smlp-") as directory:
        corpus = text.make_corpus(options.work or Path(directory), VOCABULARY)
        seeds = list(range(1, options.seeds + 1))
        for seed in seeds:
            for name in MODELS:
                if key(name, seed) in result["runs"]:
                    continue
                result["runs"][key(name, seed)] = told = run(recipe(corpus, name, seed, options), device)
                options.output.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{key(name, seed)}: {told['heldOutLoss']:.4f} after {told['seconds']} s", flush=True)
    print("\n".join(summary(result["runs"], seeds)))
    plot(result["runs"], seeds, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
