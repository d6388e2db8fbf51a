"""Masked language modelling (BERT, 1810.04805 §3.1; XLM-R, 1911.02116 §3): tokens that a model does not see, or not for
certain, from what stands on both sides of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from trireme_api.evaluation import in_words
from trireme_api.families import ModelConfig
from trireme_api.masking import MaskingSpec
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches
from trireme_trainer.data.masking import MaskedBatch, MaskedBlocks, Sample
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.order import derive
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.masked import MaskedHeldOut, MaskedSource
from trireme_trainer.evaluation.training import due
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.base import Objective
from trireme_trainer.objectives.cross_entropy import IGNORED, ChunkedCrossEntropy
from trireme_trainer.parallel.world import World

log = logging.getLogger(__name__)
_MASKS = 3
"""Purpose of keys, beside those of the mixture's documents and blocks and of held-out text."""


class MaskedText:
    """The blocks of a mixture, of T − 1 tokens behind the one that begins a sequence, and what is hidden of each: a
    function of (seed, source, epoch, block), so new in every epoch and the same in any world."""

    def __init__(self, recipe: Recipe) -> None:
        self.sequence_length = recipe.data.sequence_length
        self._spec: MaskingSpec = recipe.masks
        # A mixture's block is one token longer than its sequences.
        data = recipe.data.model_copy(update={"sequence_length": self.sequence_length - 2})
        self.mixture: Mixture = Mixture.from_recipe(recipe.model_copy(update={"data": data}))
        self.vocabulary_size = self.mixture.vocabulary_size
        self.tokenizer = self.mixture.tokenizer
        special = self.mixture.special_tokens()
        self.blocks = MaskedBlocks(self._spec, special, self.vocabulary_size, self.sequence_length)
        self._key = derive(recipe.seed, _MASKS)

    def sample(self, global_index: int) -> Sample:
        """Raises DataError for a damaged shard."""
        key = derive(self._key, *self.mixture.locate(global_index))
        return self.blocks.sample(self.mixture.sample(global_index), key)

    @property
    def held_out(self) -> list[MaskedSource]:
        """What each source holds out."""
        parts = self.mixture.parts
        names = [part.path.rstrip("/").rpartition("/")[2] for part in parts]
        return [
            MaskedSource(name, part.language, self.mixture.valid_blocks(i))
            for i, (name, part) in enumerate(zip(names, parts, strict=True))
        ]

    @property
    def identity(self) -> dict[str, Any]:
        return {
            **self.mixture.identity, "sequenceLength": self.sequence_length, "objective": "masked-lm",
            "masking": self._spec.model_dump(by_alias=True),
        }  # fmt: skip

    def changes_since(self, saved: dict[str, Any]) -> list[str]:
        now = self.identity
        found = [
            f"{name} was {saved.get(name)}, is {now[name]}"
            for name in ("objective", "masking", "sequenceLength")
            if saved.get(name) != now[name]
        ]
        return found + self.mixture.changes_since({**saved, "sequenceLength": self.mixture.sequence_length})


class MaskedBatches(Batches):
    def __init__(self, text: MaskedText, recipe: Recipe, rank: int, world: int, pin_memory: bool = False) -> None:
        super().__init__(recipe.dealt(world), rank, pin_memory)
        self._text = text

    def make(self, indices: list[int | None]) -> MaskedBatch:
        return self._text.blocks.batch([None if index is None else self._text.sample(index) for index in indices])


class MaskedLM(ChunkedCrossEntropy):
    """Callable `(model, batch, valid) -> loss`, shape [], fp32. Only places to predict have logits."""

    def __call__(
        self, model: LanguageModel, batch: MaskedBatch, valid: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        targets_N = batch.targets.flatten()[batch.places]
        return self.loss(model, batch.tokens, targets_N, valid, scale, batch.places)


class MaskedTokens(Objective):
    """Cross-entropy of hidden tokens over the blocks of a mixture."""

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World, compile_backend: str | None) -> None:
        self._recipe = recipe
        self._world = world
        self._loss = MaskedLM(config.vocabulary_size, compile_backend=compile_backend)
        self.samples: MaskedText = MaskedText(recipe)
        self._held_out: MaskedHeldOut | None = None
        if (spec := recipe.evaluation) is not None:
            sequences = spec.sequences or recipe.batch.micro
            self._held_out = MaskedHeldOut(
                self.samples.held_out, self.samples.blocks, recipe.seed, sequences, spec.tokens
            )
            if self._held_out.empty:
                raise EvaluationError(
                    "evaluation.heldOut: none of data.sources holds out a block of data.sequenceLength; prepare them "
                    "with a larger --valid-fraction, or remove evaluation"
                )

    def batches(self, rank: int, world: int, pin_memory: bool) -> Batches:
        return MaskedBatches(self.samples, self._recipe, rank, world, pin_memory)

    def told(self) -> list[dict[str, Any]]:
        return self.samples.mixture.told(self._recipe.total_steps * self._recipe.sequences_per_step)

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        assert isinstance(batch, MaskedBatch)
        before_pass()
        share = (batch.targets != IGNORED).sum() / valid
        set_share(model, share if scale is None else share * scale)
        loss = self._loss(model, batch, valid, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def trained_tokens(self, valid: float) -> float:
        """All of the step's: each goes through the model, whether it is predicted or not."""
        return float(self._recipe.batch.tokens)

    def due(self, step: int, last: bool) -> bool:
        return due(self._recipe.evaluation, step, last)

    def evaluate(self, model: LanguageModel, alive: Callable[[], None]) -> dict[str, Any]:
        """Perplexity of hidden tokens of held-out text, dealt to all ranks."""
        if self._held_out is None:
            return {}
        found = {"heldOut": self._held_out.run(model, self._world, lambda *_: alive()), "tasks": []}
        for line in in_words(found):
            log.info("evaluation: %s", line)
        return found
