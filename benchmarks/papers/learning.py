"""Causal language models trained in this process, their held-out loss measured on the way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.objectives.causal_lm import CausalLM
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.optimization.schedule import learning_rate
from trireme_trainer.parallel.initialise import initialise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Learner:
    """A model with its initial values, its data and its optimiser, as a recipe has them; one micro-batch a step."""

    def __init__(self, spec: Recipe) -> None:
        self._spec = spec
        self.config = check_recipe(spec)
        self.model: LanguageModel = build(self.config).to(DEVICE)
        initialise(self.model, spec.seed)
        self.mixture = Mixture.from_recipe(spec)
        self._objective = CausalLM(self.config.vocabulary_size)
        self._optimizer = Optimizer(self.model, spec.optimizer)

    def steps(self, before_update: Callable[[int], None] = lambda step: None) -> Iterator[tuple[int, float]]:
        """Trains; yields (step from 1 on, its loss in nats per token). `before_update`: called with the step while its
        clipped gradients are there. A step that is not finite leaves the weights alone."""
        spec, rows = self._spec, self._spec.sequences_per_step
        for step in range(1, spec.total_steps + 1):
            self.model.train()
            loss = self._loss([self.mixture.sample((step - 1) * rows + row) for row in range(rows)])
            loss.backward()  # type: ignore[no-untyped-call]
            never = (~torch.isfinite(self._optimizer.clip())).float()
            before_update(step)
            self._optimizer.step(learning_rate(spec, step * spec.batch.tokens), never)
            yield step, float(loss.detach())

    def held_out(self, count: int) -> float:
        """Mean loss on `count` blocks of held-out text, evenly spread; in evaluation mode. Ends the program where there
        are fewer."""
        held, rows = self.mixture.valid_blocks(), self._spec.sequences_per_step
        if len(held) < count:
            sys.exit(f"{len(held)} held-out blocks; {count} are needed")
        blocks = [held[number * (len(held) // count)] for number in range(count)]
        self.model.eval()
        with torch.no_grad():
            parts = [float(self._loss(blocks[first : first + rows])) for first in range(0, count, rows)]
        return sum(parts) / len(parts)

    def _loss(self, blocks: Sequence[NDArray[Any]]) -> Tensor:
        tokens = torch.from_numpy(np.stack(blocks)).to(DEVICE)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return self._objective(self.model, inputs, targets, torch.tensor(float(targets.numel()), device=DEVICE))


def finite(loss: float, digits: int = 5) -> float | None:
    return round(loss, digits) if math.isfinite(loss) else None


def learn(spec: Recipe, probes: Sequence[int], held_out: int) -> dict[str, Any]:
    """Trains by `spec`. `probes`: steps after which the loss on `held_out` blocks is measured, nats per token; None
    where it is not finite."""
    learner = Learner(spec)
    losses, told = [], []
    for step, loss in learner.steps():
        losses.append(round(loss, 4))
        if step in probes:
            told.append(finite(learner.held_out(held_out)))
    config = learner.config
    count = config.parameters()
    return {
        "probes": list(probes), "heldOutLosses": told, "losses": losses[::10], "parameters": count.total,
        "activated": count.activated, "flopsPerToken": config.train_flops_per_token(spec.data.sequence_length),
    }  # fmt: skip
