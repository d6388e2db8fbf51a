"""One causal language model trained in this process, its held-out loss measured on the way."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
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
from trireme_trainer.optim import Optimizer
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.schedule import learning_rate


def learn(spec: Recipe, probes: Sequence[int], held_out: int) -> dict[str, Any]:
    """Trains by `spec`, one micro-batch a step. `probes`: steps after which the loss on `held_out` blocks is measured,
    nats per token; None where it is not finite."""
    began = time.perf_counter()
    config = check_recipe(spec)
    model = build(config)
    initialise(model, spec.seed)
    mixture = Mixture.from_recipe(spec)
    objective, optimizer = CausalLM(config.vocabulary_size), Optimizer(model, spec.optimizer)
    rows, losses, told = spec.sequences_per_step, [], []
    for step in range(spec.total_steps):
        loss = _loss(model, objective, [mixture.sample(step * rows + row) for row in range(rows)])
        loss.backward()  # type: ignore[no-untyped-call]
        never = (~torch.isfinite(optimizer.clip())).float()
        optimizer.step(learning_rate(spec, (step + 1) * spec.batch.tokens), never)
        losses.append(round(float(loss.detach()), 4))
        if step + 1 in probes:
            told.append(_held_out(model, objective, mixture, held_out, rows))
    count = config.parameters()
    return {
        "probes": list(probes), "heldOutLosses": told, "losses": losses[::10], "parameters": count.total,
        "activated": count.activated, "flopsPerToken": config.train_flops_per_token(spec.data.sequence_length),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def _held_out(model: LanguageModel, objective: CausalLM, mixture: Mixture, count: int, rows: int) -> float | None:
    held = mixture.valid_blocks()
    if len(held) < count:
        sys.exit(f"{len(held)} held-out blocks; {count} are needed")
    blocks = [held[number * (len(held) // count)] for number in range(count)]
    was, _ = model.training, model.eval()
    with torch.no_grad():
        parts = [float(_loss(model, objective, blocks[first : first + rows])) for first in range(0, count, rows)]
    model.train(was)
    mean = sum(parts) / len(parts)
    return round(mean, 5) if math.isfinite(mean) else None


def _loss(model: LanguageModel, objective: CausalLM, blocks: Sequence[NDArray[Any]]) -> Tensor:
    tokens = torch.from_numpy(np.stack(blocks))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return objective(model, inputs, targets, torch.tensor(float(targets.numel())))
