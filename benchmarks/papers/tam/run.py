"""TAM (2012.09543) in miniature: accuracy on unseen tasks against the number of examples, beside every baseline, on the
three kinds of generated tasks.

    python benchmarks/papers/tam/run.py             # about half an hour on one idle core

All methods make as many passes over their episodes: one that takes four steps on an embedding per step on the weights
makes a quarter of the steps of one that takes one.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.families import build
from trireme_trainer.fewshot.baselines import MULTITASK, NO_ADAPTATION, Cavia, MatchingNetworks
from trireme_trainer.fewshot.evaluate import Few
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.optimization.schedule import learning_rate
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.world import World

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniature import Miniature, Options, Run, Runs, main, seeds

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


def passes(options: Options, family: str) -> int:
    return int(options.passes or PASSES[family])


def recipe(options: Options, family: str, method: Method, seed: int) -> Recipe:
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
    steps = passes(options, family) // Recipe.model_validate(spec).episodes.passes
    spec |= {"until": {"steps": steps}, "schedule": {"warmupTokens": steps // 20 * tokens, "finalFraction": 0.0}}
    return Recipe.model_validate(spec)


def run(options: Options, family: str, name: str, seed: int, _: None) -> Run:
    """Trains, then asks the held-out tasks: mean over tasks and draws of the examples."""
    method = METHODS[name]
    spec = recipe(options, family, method, seed)
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
        for draw in range(options.draws):
            how = Few(shots, few.adaptation_steps, few.inner_learning_rate, few.queries, draw)
            counted += objective.learned_from(model, tasks, how).sum(0)
        right, asked, loss = counted.tolist()
        accuracy[str(shots)], nats[str(shots)] = round(right / asked, 5), round(loss / asked, 5)
    return {
        "accuracy": accuracy, "nats": nats, "steps": spec.total_steps, "trainingSeconds": round(trained, 1),
        "trainingLoss": round(statistics.mean(losses[-50:]), 4), "parameters": config.parameters().total,
    }  # fmt: skip


def key(family: str, method: str, seed: int) -> str:
    return f"{family}; {method}; seed {seed}"


def plan(options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[None], Run]]]:
    for seed in seeds(options):
        for family in options.only:
            for name in options.methods:
                yield key(family, name, seed), partial(run, options, family, name, seed)


def of(runs: Runs, family: str, method: str, among: list[int], what: str, shots: int) -> list[float]:
    """By seed, as far as it was run."""
    told = (runs.get(key(family, method, seed), {}).get(what, {}) for seed in among)
    return [found[str(shots)] for found in told if str(shots) in found]


def table(options: Options, runs: Runs) -> list[str]:
    """Per family: accuracy and nats by number of examples; what is monotone in it; what the training took."""
    lines, families = [], options.only
    for family in families:
        for title, what, scale, digits in TABLES:
            lines += ["", f"| {family}, {title} | {' | '.join(f'k = {k}' for k in SHOTS)} |", "|---" + "|--:" * 6 + "|"]
            for name in METHODS:
                cells = []
                for shots in SHOTS:
                    found = [scale * value for value in of(runs, family, name, seeds(options), what, shots)]
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
            for seed in seeds(options):
                curve = [of(runs, family, name, [seed], "accuracy", k) for k in ks]
                pairs += [(a[0], b[0]) for a, b in itertools.pairwise(curve) if a and b]
            cells.append(f"{sum(b > a for a, b in pairs)} of {len(pairs)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| seconds of training, median | {names} |", rule]
    for name in METHODS:
        told = [[runs.get(key(family, name, seed), {}) for seed in seeds(options)] for family in families]
        took = [[run["trainingSeconds"] for run in each if "trainingSeconds" in run] for each in told]
        lines.append(f"| {name} | {' | '.join(f'{statistics.median(each):.0f}' if each else '' for each in took)} |")
    return lines


def plot(options: Options, runs: Runs) -> Figure:
    """Accuracy over the number of examples, a panel per family; a line joins means, bars reach from seed to seed."""
    families = options.only
    size = (4.3 * len(families), 3.8)
    figure, panels = plt.subplots(1, len(families), figsize=size, layout="constrained", squeeze=False)
    for panel, family in zip(panels[0], families, strict=True):
        for name, method in METHODS.items():
            seen = [of(runs, family, name, seeds(options), "accuracy", shots) for shots in method.shots]
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
    panels[0][0].legend(fontsize=7)
    return figure


def shape(options: Options) -> dict[str, Any]:
    same = {name: getattr(options, name) for name in ("width", "rate", "inner", "adapt", "draws")}
    return same | {"lengths": LENGTHS, "heldOut": HELD_OUT, "passes": {name: passes(options, name) for name in LENGTHS}}


PAPER = Miniature(
    __file__, __doc__,
    settings={
        "seeds": 2, "passes": 0, "width": 32, "rate": 3e-3, "inner": 1.0, "adapt": 20, "draws": 1,
        "only": list(LENGTHS), "methods": list(METHODS),
    },
    quick={"seeds": 1, "passes": 20, "adapt": 2},
    shape=shape, corpus=lambda directory: (None, "generated tasks"), plan=plan, table=table, plot=plot,
)  # fmt: skip


if __name__ == "__main__":
    main(PAPER)
