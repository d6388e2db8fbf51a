"""Anytime learning (2106.09563) of language models in miniature: text in five mega-batches, growing as in `grow`.
A reconstruction: the language part of the paper was never released.

    python benchmarks/papers/alma/language.py             # three and a half minutes on one core
    python benchmarks/papers/alma/language.py --quick     # one seed, one epoch a session; keeps nothing

All learners of a seed see the same blocks. Each finished run is written at once; started again, it goes on with those
that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trireme_api.families.growing import GrowingConfig
from trireme_api.recipe import DataSource
from trireme_trainer.anytime.language import divide, most_used, usage
from trireme_trainer.anytime.learners import Ensemble, GrowingEnsemble, Learner, Single
from trireme_trainer.anytime.loop import run as stream_through
from trireme_trainer.anytime.session import Data, Fit, nats
from trireme_trainer.anytime.stream import Plan
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.parallel.initialise import initialise

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import processes  # noqa: E402
import text  # noqa: E402

VOCABULARY, LENGTH = 512, 64
MEGA_BATCHES, BLOCKS, TEST = 5, 1200, 64
SMALL, LARGE = 32, 64


def network(width: int) -> Callable[[torch.Generator], LanguageModel]:
    """Two layers; initial values are a function of the generator's first number."""

    def make(random: torch.Generator) -> LanguageModel:
        config = GrowingConfig(
            layers=2, width=width, heads=2, dropout=0.0, attention_dropout=0.0, vocabulary_size=VOCABULARY,
            maximum_positions=LENGTH,
        )  # fmt: skip
        model = build(config)
        initialise(model, int(torch.randint(2**31 - 1, (), generator=random)))
        return model

    return make


class Growing(Single):
    """Grows before each session but the first, by what the validation rows use."""

    model: LanguageModel

    def train(self, number: int, train: Data, validation: Data) -> float:
        if number > 1:
            config = self.model.config
            assert isinstance(config, GrowingConfig)
            chosen = most_used(usage(self.model, validation.inputs))
            bigger = build(config.split(chosen)).eval()
            weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
            bigger.load_state_dict(divide(weights, chosen, bigger, number), strict=False)
            self.model = bigger
        return super().train(number, train, validation)


LEARNERS: dict[str, tuple[Callable[[Fit, int], Learner], Plan]] = {
    f"single, width {SMALL}": (lambda fit, seed: Single(network(SMALL), fit, seed), Plan(MEGA_BATCHES)),
    f"single, width {LARGE}": (lambda fit, seed: Single(network(LARGE), fit, seed), Plan(MEGA_BATCHES)),
    f"replay, width {SMALL}": (lambda fit, seed: Single(network(SMALL), fit, seed), Plan(MEGA_BATCHES, replay=1.0)),
    f"ensemble of 3, width {SMALL}": (lambda fit, seed: Ensemble(network(SMALL), fit, seed), Plan(MEGA_BATCHES)),
    f"growing ensemble, width {SMALL}": (
        lambda fit, seed: GrowingEnsemble(network(SMALL), fit, seed), Plan(MEGA_BATCHES),
    ),
    f"growing mixture, width {SMALL}": (lambda fit, seed: Growing(network(SMALL), fit, seed), Plan(MEGA_BATCHES)),
    f"single, width {SMALL}, w = {MEGA_BATCHES}": (
        lambda fit, seed: Single(network(SMALL), fit, seed), Plan(MEGA_BATCHES, wait=MEGA_BATCHES),
    ),
}  # fmt: skip


def blocks(corpus: Path, seed: int) -> tuple[Data, Data]:
    """[blocks, 64] tokens and those that follow them: what arrives, and the test set."""
    mixture = Mixture([DataSource(path=str(corpus))], LENGTH, seed)
    arriving = torch.from_numpy(np.stack([mixture.sample(i) for i in range(BLOCKS)]))
    held = mixture.valid_blocks()
    test = torch.from_numpy(np.stack([held[i * len(held) // TEST] for i in range(TEST)]))
    return Data(arriving[:, :-1], arriving[:, 1:]), Data(test[:, :-1], test[:, 1:])


def run(name: str, corpus: Path, seed: int, fit: Fit) -> dict[str, Any]:
    began = time.perf_counter()
    data, test = blocks(corpus, seed)
    make, plan = LEARNERS[name]
    course = stream_through(make(fit, seed), data, test, plan, fit, seed)
    return {
        "meanNats": round(course.error_rate, 5), "finalNats": round(course.final_error_rate, 5),
        "nats": [round(moment.errors / test.targets.numel(), 5) for moment in course.moments],
        "parameters": [moment.parameters for moment in course.moments],
        "memory": course.memory, "gigaflops": round(course.flops / 1e9, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def summary(runs: dict[str, dict[str, Any]], seeds: list[int]) -> list[str]:
    lines = [
        "| learner | nats a token, over the stream | at the end | parameters at the end | cumulative memory | GFLOP |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in LEARNERS:
        of = {what: [runs[key(name, s)][what] for s in seeds] for what in ("meanNats", "finalNats", "gigaflops")}
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (of["meanNats"], of["finalNats"])]
        first = runs[key(name, seeds[0])]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {first['parameters'][-1]:,} | {first['memory']:,} "
            f"| {statistics.mean(of['gigaflops']):.1f} |"
        )
    return lines


def key(name: str, seed: int) -> str:
    return f"{name}; seed {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of a session, at most")
    parser.add_argument("--quick", action="store_true", help="1 seed, 1 epoch; prints, keeps nothing")
    parser.add_argument("--output", type=Path, default=HERE / "result-language.json")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = 1, 1
    torch.set_num_threads(1)
    fit = Fit(
        epochs=options.epochs, patience=1, batch=8, errors=nats,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
    )  # fmt: skip
    shape = {"epochs": options.epochs, "blocks": BLOCKS, "length": LENGTH, "megaBatches": MEGA_BATCHES}
    result: dict[str, Any] = {"machine": processes.machine(), "text": text.name(), "shape": shape, "runs": {}}
    if options.output.exists() and not options.quick:
        known = json.loads(options.output.read_text())
        if (known["shape"], known["text"]) == (shape, text.name()):
            result = known
    seeds = list(range(1, options.seeds + 1))
    with tempfile.TemporaryDirectory(prefix="alma-") as directory:
        corpus = text.make_corpus(Path(directory), VOCABULARY)
        for seed in seeds:
            for name in LEARNERS:
                if key(name, seed) in result["runs"]:
                    continue
                told = result["runs"][key(name, seed)] = run(name, corpus, seed, fit)
                if not options.quick:
                    options.output.write_text(json.dumps(result) + "\n")
                print(f"{key(name, seed)}: {told['meanNats']:.3f}, {told['seconds']} s", flush=True)
    print("\n".join(summary(result["runs"], seeds)))


if __name__ == "__main__":
    main()
