"""FSDP (2304.11277) in miniature: the same training as with full copies on every rank, at a fraction of the memory.

    python benchmarks/papers/fsdp/run.py            # about ten minutes on two cores
    python benchmarks/papers/fsdp/run.py --quick    # does it run? F = 1 and 4, five steps; keeps nothing

Four ranks train one model with sharding factors 1 (full copies, as under DDP), 2 and 4, with parameters given back
after the forward pass and kept; a single process is the yardstick of the losses. Exit code 1 where a loss differs.
What is in result.json is told and not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import processes  # noqa: E402
import text  # noqa: E402

RANKS = 4
TOLERANCE = 1e-5
VOCABULARY = 1024
Shardings = dict[str, dict[str, Any]]
SHARDINGS: Shardings = {
    "F=1": {"shard": "hybrid", "shardSize": 1},
    "F=2": {"shard": "hybrid", "shardSize": 2},
    "F=4": {"shard": "full"},
    "F=4, kept after forward": {"shard": "full", "reshardAfterForward": False},
}


def recipe(corpus: Path, seed: int, steps: int, *, width: int, layers: int, **parallelism: Any) -> dict[str, Any]:
    overrides = {"width": width, "layers": layers, "vocabularySize": VOCABULARY, "maximumPositions": 128}
    return {
        "model": {"preset": "opt-8m", "overrides": {**overrides, "dropout": 0.0, "attentionDropout": 0.0}},
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": 128},
        "batch": {"tokens": 8 * 128, "micro": 2},
        "optimizer": {"learningRate": 1e-3},
        "schedule": {"warmupTokens": 10 * 8 * 128},
        "precision": "fp32",
        "parallelism": parallelism,
        "until": {"steps": steps},
        "seed": seed,
    }


def losses(corpus: Path, work: Path, shardings: Shardings, seeds: list[int], steps: int) -> list[dict[str, Any]]:
    """Per sharding: largest difference from a single process over all steps and seeds, and seconds a step."""
    small = {"width": 128, "layers": 4}
    alone = {s: processes.train(recipe(corpus, s, steps, **small), work / f"alone-{s}")["losses"] for s in seeds}
    rows = []
    for name, parallelism in shardings.items():
        differences, seconds, last = [], [], []
        for seed in seeds:
            spec = recipe(corpus, seed, steps, **small, **parallelism)
            run = processes.train(spec, work / f"{name}-{seed}", RANKS)
            differences += [abs(a - b) for a, b in zip(run["losses"], alone[seed], strict=True)]
            seconds += [row["seconds"] for row in run["rows"][2:]]
            last.append(run["losses"][-1])
        rows.append({
            "sharding": name, "largestLossDifference": max(differences), "stepSeconds": statistics.median(seconds),
            "firstLoss": alone[seeds[0]][0], "lastLosses": last,
        })  # fmt: skip
        print(f"{name}: losses within {max(differences):.1e} of one process", flush=True)
    return rows


def memory(corpus: Path, work: Path, shardings: Shardings, layers: int, width: int) -> list[dict[str, Any]]:
    """Per sharding: bytes alive on the rank that holds most."""
    rows = []
    for name, parallelism in shardings.items():
        spec = recipe(corpus, 1, 2, width=width, layers=layers, **parallelism)
        out = work / f"memory-{name}"
        processes.launch([sys.executable, str(HERE / "rank.py"), str(out)], spec, work / f"ranks-{name}", RANKS)
        told = [json.loads(Path(f"{out}-{rank}").read_text()) for rank in range(RANKS)]
        rows.append({"sharding": name, **{key: max(rank[key] for rank in told) for key in told[0]}})
        print(f"{name}: {rows[-1]}", flush=True)
    return rows


def table(kept: list[dict[str, Any]], trained: list[dict[str, Any]]) -> str:
    lines = [
        "| sharding | weights MB | weights and moments MB | of F=1 | peak of initialisation MB | peak of steps MB "
        "| of F=1 | largest loss difference | s per step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row, run in zip(kept, trained, strict=True):
        mega = {key: f"{value / 1e6:.1f}" for key, value in row.items() if key != "sharding"}
        lines.append(
            f"| {row['sharding']} | {mega['weights']} | {mega['state']} | {row['state'] / kept[0]['state']:.2f} "
            f"| {mega['peakOfInitialisation']} | {mega['peakOfSteps']} "
            f"| {row['peakOfSteps'] / kept[0]['peakOfSteps']:.2f} "
            f"| {run['largestLossDifference']:.1e} | {run['stepSeconds']:.2f} |"
        )
    return "\n".join(lines)


def measure(shardings: Shardings, seeds: list[int], steps: int, shape: dict[str, int]) -> dict[str, Any]:
    """`shape`: of the model whose memory is counted."""
    with tempfile.TemporaryDirectory(prefix="fsdp-") as directory:
        work = Path(directory)
        corpus = text.make_corpus(work, VOCABULARY)
        kept = memory(corpus, work, shardings, **shape)
        trained = losses(corpus, work, shardings, seeds, steps)
    return {
        "machine": processes.machine(), "text": text.name(), "ranks": RANKS, "seeds": seeds, "steps": steps,
        "memoryModel": shape, "memory": kept, "losses": trained,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    if options.quick:
        result = measure({name: SHARDINGS[name] for name in ("F=1", "F=4")}, [1], 5, {"layers": 2, "width": 128})
    elif options.output.exists():
        result = json.loads(options.output.read_text())
    else:
        result = measure(SHARDINGS, [1, 2, 3], 40, {"layers": 12, "width": 384})
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["memory"], result["losses"]))
    if any(row["largestLossDifference"] > TOLERANCE for row in result["losses"]):
        sys.exit("losses differ")


if __name__ == "__main__":
    main()
