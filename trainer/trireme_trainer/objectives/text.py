"""Learning from text: a mixture of corpora, a target per token, one pass per micro-batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches, TextBatches
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.base import Objective
from trireme_trainer.objectives.causal_lm import IGNORED, CausalLM


class NextToken(Objective):
    """Cross-entropy of the next token over the blocks of a mixture."""

    def __init__(self, recipe: Recipe, config: ModelConfig, compile_backend: str | None) -> None:
        self._recipe = recipe
        self._loss = CausalLM(config.vocabulary_size, compile_backend=compile_backend)
        self.samples: Mixture = Mixture.from_recipe(recipe)

    def batches(self, rank: int, world: int, pin_memory: bool) -> Batches:
        return TextBatches(self.samples, self._recipe, rank, world, pin_memory)

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        before_pass()
        share = (batch.targets != IGNORED).sum() / valid
        set_share(model, share if scale is None else share * scale)
        loss = self._loss(model, batch.tokens, batch.targets, valid, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
