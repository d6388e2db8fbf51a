"""Learning from text: a mixture of corpora, a target per token, one pass per micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trireme_api.evaluation import in_words
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches, TextBatches
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.order import derive
from trireme_trainer.evaluation.training import due, during_training
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.base import Objective
from trireme_trainer.objectives.causal_lm import IGNORED, CausalLM
from trireme_trainer.parallel.world import World

log = logging.getLogger(__name__)
_MEMBER = 0x6D656D62
"""Keeps seeds of members apart from those of sessions."""


class NextToken(Objective):
    """Cross-entropy of the next token over the blocks of a mixture. Members of an ensemble are trained one by one, each
    with the gradients it would have alone and, but for the first, on an order of its own; the loss told is their mean.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World, compile_backend: str | None) -> None:
        self._recipe = recipe
        self._world = world
        self._loss = CausalLM(config.vocabulary_size, compile_backend=compile_backend)
        self.samples: Mixture = Mixture.from_recipe(recipe)
        self._further = [
            Mixture.from_recipe(recipe.model_copy(update={"seed": derive(recipe.seed, _MEMBER, member) & 0x7FFFFFFF}))
            for member in range(1, config.turns)
        ]
        self._turns = config.turns
        self._suite = during_training(recipe, config, self.samples.directories) if recipe.evaluation else None

    def batches(self, rank: int, world: int, pin_memory: bool) -> Batches:
        return TextBatches(self.samples, self._recipe, rank, world, pin_memory, self._further)

    def told(self) -> list[dict[str, Any]]:
        return self.samples.told(self._recipe.total_steps * self._recipe.sequences_per_step)

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        before_pass()
        valid = valid / self._turns
        losses = torch.zeros((), dtype=torch.float32, device=valid.device)
        for member, own in zip(model.trained(), batch.shared_out(self._turns), strict=True):
            share = (own.targets != IGNORED).sum() / valid
            set_share(member, share if scale is None else share * scale)
            loss = self._loss(member, own.tokens, own.targets, valid, scale)
            loss.backward()  # type: ignore[no-untyped-call]
            losses += loss.detach()
        return losses / self._turns

    def trained_tokens(self, valid: float) -> float:
        """As many for each member."""
        return valid / self._turns

    def due(self, step: int, last: bool) -> bool:
        return due(self._recipe.evaluation, step, last)

    def evaluate(self, model: LanguageModel, alive: Callable[[], None]) -> dict[str, Any]:
        """Held-out perplexity and tasks, dealt to all ranks."""
        if self._suite is None:
            return {}
        found = self._suite.run(model, self._world, lambda *_: alive())
        for line in in_words(found):
            log.info("evaluation: %s", line)
        return found
