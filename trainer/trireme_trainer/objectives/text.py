"""Learning from text: a mixture of corpora, a target per token, one pass per micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from trireme_api.evaluation import in_words
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches, TextBatches
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.evaluation.training import due, during_training
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.base import Objective
from trireme_trainer.objectives.causal_lm import IGNORED, CausalLM
from trireme_trainer.parallel.world import World

log = logging.getLogger(__name__)


class NextToken(Objective):
    """Cross-entropy of the next token over the blocks of a mixture."""

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World, compile_backend: str | None) -> None:
        self._recipe = recipe
        self._world = world
        self._loss = CausalLM(config.vocabulary_size, compile_backend=compile_backend)
        self.samples: Mixture = Mixture.from_recipe(recipe)
        self._suite = during_training(recipe, config, self.samples.directories) if recipe.evaluation else None

    def batches(self, rank: int, world: int, pin_memory: bool) -> Batches:
        return TextBatches(self.samples, self._recipe, rank, world, pin_memory)

    def told(self) -> list[dict[str, Any]]:
        return self.samples.told(self._recipe.total_steps * self._recipe.sequences_per_step)

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        before_pass()
        share = (batch.targets != IGNORED).sum() / valid
        set_share(model, share if scale is None else share * scale)
        loss = self._loss(model, batch.tokens, batch.targets, valid, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

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
