"""TAM (2012.09543) in miniature: accuracy on unseen tasks against the number of examples, beside every baseline, on the
three kinds of generated tasks.

    python benchmarks/papers/tam/run.py             # by estimate twenty minutes on one idle core
    python benchmarks/papers/tam/run.py --quick     # one seed, a tenth of the training; prints, keeps nothing

All methods make as many passes over their episodes: one that takes four steps on an embedding per step on the weights
makes a quarter of the steps of one that takes one. Each finished run is written at once; started again, it goes on
with those that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.families import build
from trireme_trainer.fewshot.baselines import MULTITASK, NO_ADAPTATION, Cavia, MatchingNetworks
from trireme_trainer.fewshot.evaluate import Few
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.optim import Optimizer
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.world import World
from trireme_trainer.schedule import learning_rate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import processes  # noqa: E402

Runs = dict[str, dict[str, Any]]
TABLES = (("accuracy %", "accuracy", 100, 1), ("nats per answer token", "nats", 1, 2))
"""Title, figure of a run, factor, digits."""
SHOTS = (0, 1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Method:
    few_shot: dict[str, Any]
    kind: type[FewShot] = FewShot
    shots: tuple[int, ...] = SHOTS
    colour: str = "black"


INNER = 4
METHODS = {
    "TAM, accumulate": Method({"innerSteps": INNER, "outerGrad": "accumulate"}, colour="tab:blue"),
    "TAM, final": Method({"innerSteps": INNER, "outerGrad": "final"}, colour="tab:cyan"),
    "TAM, compositional": Method(
        {"innerSteps": INNER, "outerGrad": "accumulate", "embedding": "compositional"}, colour="tab:red"
    ),
    "no adaptation": Method(NO_ADAPTATION, shots=(0,), colour="black"),
    "multitask": Method(MULTITASK, colour="tab:gray"),
    "Matching Networks": Method({"innerSteps": 0, "outerGrad": "final"}, MatchingNetworks, SHOTS[1:], "tab:olive"),
    "CAVIA": Method({"innerSteps": INNER, "outerGrad": "final"}, Cavia, colour="tab:green"),
}  # fmt: skip
PASSES = {"classification": 2400, "transduction": 4800, "path-finding": 600}
"""Forward and backward passes of a training, the same for every method."""
LENGTHS = {"classification": 8, "transduction": 13, "path-finding": 14}
HELD_OUT = {"classification": 16, "transduction": 16, "path-finding": 12}
EXAMPLES, TASKS, QUERIES = 20, 4, 50


def recipe(family: str, method: Method, seed: int, passes: int, options: argparse.Namespace) -> Recipe:
    length = LENGTHS[family]
    tokens = TASKS * EXAMPLES * length
    shape = {
        "layers": 2, "width": options.width, "embeddingWidth": options.width, "heads": 4,
        "feedForwardWidth": 4 * options.width, "maximumPositions": length, "vocabularySize": 16, "dropout": 0.0,
        "attentionDropout": 0.0, "initialStd": 0.1,
    }  # fmt: skip
    few = {
        "examples": EXAMPLES, "innerLearningRate": options.inner, "heldOutTasks": HELD_OUT[family], "queries": QUERIES,
        "adaptationSteps": options.adapt, **method.few_shot, "shots": list(method.shots),
    }  # fmt: skip
    spec = {
        "model": {"preset": "opt-tiny", "overrides": shape},
        "objective": "few-shot",
        "fewShot": few,
        "data": {"sources": [{"path": f"tasks://{family}"}], "sequenceLength": length},
        "batch": {"tokens": tokens, "micro": TASKS * EXAMPLES},
        "optimizer": {"learningRate": options.rate, "betas": [0.9, 0.98], "weightDecay": 0.01},
        "precision": "fp32",
        "until": {"steps": 1},
        "seed": seed,
    }  # fmt: skip
    steps = passes // Recipe.model_validate(spec).episodes.passes
    spec |= {"until": {"steps": steps}, "schedule": {"warmupTokens": steps // 20 * tokens, "finalFraction": 0.0}}
    return Recipe.model_validate(spec)


def run(spec: Recipe, method: Method, draws: int) -> dict[str, Any]:
    """Trains, then asks the held-out tasks: mean over tasks and draws of the examples."""
    config = check_recipe(spec)
    model = build(config)
    initialise(model, spec.seed)
    objective = method.kind(spec, config, World(0, 1, 0, 1, torch.device("cpu")))
    optimizer = Optimizer(model, spec.optimizer)
    never = torch.zeros(())
    began = time.perf_counter()
    losses = []
    with objective.batches(0, 1, False) as batches:
        for step in range(spec.total_steps):
            (batch,) = batches.micro_batches(step)
            loss = objective.learn(model, batch, (batch.targets >= 0).sum().float(), None, lambda: None)
            optimizer.clip()
            optimizer.step(learning_rate(spec, (step + 1) * spec.batch.tokens), never)
            objective.after_step(never)
            losses.append(float(loss))
    trained = time.perf_counter() - began
    model.eval()
    accuracy, nats = {}, {}
    tasks, few = objective.samples.held_out, spec.episodes
    for shots in method.shots:
        counted = torch.zeros(3, dtype=torch.float64)
        for draw in range(draws):
            how = Few(shots, few.adaptation_steps, few.inner_learning_rate, few.queries, draw)
            counted += objective.learned_from(model, tasks, how).sum(0)
        right, asked, loss = counted.tolist()
        accuracy[str(shots)], nats[str(shots)] = round(right / asked, 5), round(loss / asked, 5)
    return {
        "accuracy": accuracy, "nats": nats, "steps": spec.total_steps, "trainingSeconds": round(trained, 1),
        "trainingLoss": round(statistics.mean(losses[-50:]), 4), "parameters": config.parameters().total,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def key(family: str, method: str, seed: int) -> str:
    return f"{family}; {method}; seed {seed}"


def of(runs: Runs, family: str, method: str, seeds: list[int], what: str, shots: int) -> list[float]:
    """By seed, as far as it was run."""
    told = (runs.get(key(family, method, seed), {}).get(what, {}) for seed in seeds)
    return [found[str(shots)] for found in told if str(shots) in found]


def summary(runs: Runs, families: list[str], seeds: list[int]) -> list[str]:
    """Per family: accuracy and nats by number of examples; what is monotone in it; what the training took."""
    lines = []
    for family in families:
        for title, what, scale, digits in TABLES:
            lines += ["", f"| {family}, {title} | {' | '.join(f'k = {k}' for k in SHOTS)} |", "|---" + "|--:" * 6 + "|"]
            for name in METHODS:
                cells = []
                for shots in SHOTS:
                    found = [scale * value for value in of(runs, family, name, seeds, what, shots)]
                    if not found:
                        cells.append("")
                        continue
                    spread = len(found) > 1 and shots in (0, 1, 20)
                    around = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if spread else ""
                    cells.append(f"{statistics.mean(found):.{digits}f}{around}")
                lines.append(f"| {name} | {' | '.join(cells)} |")
    names, rule = " | ".join(families), "|---" + "|--:" * len(families) + "|"
    lines += ["", f"| times accuracy rises from one k ≥ 1 to the next, all seeds | {names} |", rule]
    for name, method in METHODS.items():
        ks = [k for k in method.shots if k]
        if len(ks) < 2:
            continue
        cells = []
        for family in families:
            pairs = []
            for seed in seeds:
                curve = [of(runs, family, name, [seed], "accuracy", k) for k in ks]
                pairs += [(a[0], b[0]) for a, b in itertools.pairwise(curve) if a and b]
            cells.append(f"{sum(b > a for a, b in pairs)} of {len(pairs)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| seconds of training, median | {names} |", rule]
    for name in METHODS:
        told = [[runs.get(key(family, name, seed), {}) for seed in seeds] for family in families]
        took = [[run["trainingSeconds"] for run in each if "trainingSeconds" in run] for each in told]
        lines.append(f"| {name} | {' | '.join(f'{statistics.median(each):.0f}' if each else '' for each in took)} |")
    return lines


def plot(runs: Runs, families: list[str], seeds: list[int], path: Path) -> None:
    """Accuracy over the number of examples, a panel per family; a line joins means, bars reach from seed to seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(families), figsize=(4.3 * len(families), 3.8), layout="constrained")
    for panel, family in zip(panels, families, strict=True):
        for name, method in METHODS.items():
            seen = [of(runs, family, name, seeds, "accuracy", shots) for shots in method.shots]
            if not all(seen):
                continue
            means = [100 * statistics.mean(found) for found in seen]
            if len(means) == 1:
                panel.axhline(means[0], color=method.colour, linestyle=":", label=name)
                continue
            below = [mean - 100 * min(found) for mean, found in zip(means, seen, strict=True)]
            above = [100 * max(found) - mean for mean, found in zip(means, seen, strict=True)]
            places = [SHOTS.index(shots) for shots in method.shots]
            panel.errorbar(places, means, yerr=[below, above], color=method.colour, marker="o", capsize=2, label=name)
        panel.set(title=family, xlabel="examples of an unseen task, k", ylabel="answer tokens right, %")
        panel.set_xticks(range(len(SHOTS)), [str(k) for k in SHOTS])
    panels[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=0, help="of training; left out: by family")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of weights")
    parser.add_argument("--inner", type=float, default=1.0, help="learning rate of embeddings")
    parser.add_argument("--adapt", type=int, default=20, help="steps on the embedding of an unseen task")
    parser.add_argument("--draws", type=int, default=1, help="of the examples to adapt with")
    parser.add_argument("--only", nargs="+", default=list(LENGTHS), choices=list(LENGTHS), help="kinds of tasks")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="a seed, a tenth of the training; keeps nothing")
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    keeps = not options.quick
    if options.quick:
        options.seeds, options.draws = 1, 1
    torch.set_num_threads(1)
    shape = {name: getattr(options, name) for name in ("width", "rate", "inner", "adapt", "draws")}
    shape |= {"lengths": LENGTHS, "heldOut": HELD_OUT}
    result: dict[str, Any] = {"machine": processes.machine(), "shape": shape, "runs": {}}
    if options.output.exists() and keeps:
        known = json.loads(options.output.read_text())
        if known["shape"] == shape:
            result = known
    seeds = list(range(1, options.seeds + 1))
    for seed in seeds:
        for family in options.only:
            for name in options.methods:
                told = key(family, name, seed)
                passes = (options.passes or PASSES[family]) // (1 if keeps else 10)
                if result["runs"].get(told, {}).get("passes") == passes:
                    continue
                made = recipe(family, METHODS[name], seed, passes, options)
                result["runs"][told] = {"passes": passes, **run(made, METHODS[name], options.draws)}
                if keeps:
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
                row = result["runs"][told]
                print(f"{told}: {row['accuracy']}, loss {row['trainingLoss']}, {row['seconds']} s", flush=True)
    seeds = sorted({int(name.rpartition(" ")[2]) for name in result["runs"]})
    print("\n".join(summary(result["runs"], list(LENGTHS), seeds)))
    if keeps:
        plot(result["runs"], list(LENGTHS), seeds, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
