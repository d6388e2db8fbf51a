"""Training as a textbook has it: one process, plain modules, torch's own AdamW, the whole global batch at once.

Shares the model, the initial values and the samples with the trainer, and nothing of its loop, sharding or loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.checkpoint import Checkpointer, CheckpointStore
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.layers.init import full_value


def fresh_model(recipe: dict[str, Any]) -> LanguageModel:
    spec = Recipe.model_validate(recipe)
    model = build(check_recipe(spec))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(full_value(name, tuple(parameter.shape), model.initial_value(name), spec.seed))
    return model


def rate(spec: Recipe, step: int) -> float:
    """Of step `step`, from 1, written out for warm-up, then linear to `finalFraction` at the end."""
    peak, warm = spec.optimizer.learning_rate, spec.schedule.warmup_tokens / spec.batch.tokens
    end = (spec.schedule.decay_tokens or spec.total_steps * spec.batch.tokens) / spec.batch.tokens
    if step < warm:
        return peak * step / warm
    if step >= end:
        return peak * spec.schedule.final_fraction
    return peak * (1 - (1 - spec.schedule.final_fraction) * (step - warm) / (end - warm))


@dataclass(frozen=True)
class Training:
    losses: dict[int, float]
    """By step, from 1."""
    norms: dict[int, float]
    """Of the gradients, before clipping."""
    weights: dict[str, Tensor]


def train(
    recipe: dict[str, Any],
    steps: int,
    skip: Collection[int] = (),
    batches: Callable[[int], int] = lambda step: step - 1,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Training:
    """Steps (from 1) in `skip` compute a loss and leave the weights alone. `batches`: which batch (from 0) a step
    takes; `factor`: what its learning rate is multiplied by."""
    spec = Recipe.model_validate(recipe)
    model, mixture = fresh_model(recipe), Mixture.from_recipe(spec)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=spec.optimizer.learning_rate,
        betas=spec.optimizer.betas,
        eps=spec.optimizer.eps,
        weight_decay=spec.optimizer.weight_decay,
        foreach=False,
        fused=False,
    )
    losses, norms = {}, {}
    for step in range(1, steps + 1):
        first = batches(step) * spec.sequences_per_step
        blocks = torch.from_numpy(np.stack([mixture.sample(first + i) for i in range(spec.sequences_per_step)]))
        logits = model(blocks[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms[step] = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.clip).item()
        for group in optimizer.param_groups:
            group["lr"] = rate(spec, step) * factor(step)
        if step not in skip:
            optimizer.step()
        losses[step] = loss.item()
    return Training(losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()})


def saved_weights(checkpoints: Path, recipe: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of the newest good checkpoint, read back whole in this process."""
    weights = {name: torch.full_like(p, float("nan")) for name, p in fresh_model(recipe).named_parameters()}
    reader = Checkpointer(CheckpointStore(str(checkpoints)), attempt=10**6, owner="reference")
    loaded = reader.load({"model": weights}, strict=False)
    assert loaded is not None
    reader.close()
    return loaded.step, weights


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Over the steps of `one`, all of which must be in `other`."""
    assert one
    assert set(one) <= set(other), sorted(set(one) - set(other))
    return max(abs(one[step] - other[step]) for step in one)
