"""Masked language modelling (BERT, 1810.04805 §3.1; XLM-R, 1911.02116 §3): tokens that a model does not see, or not for
certain, from what stands on both sides of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trireme_api.families import ModelConfig
from trireme_api.masking import MaskingSpec
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches, Share
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.order import derive
from trireme_trainer.evaluation.masked import MaskedHeldOut
from trireme_trainer.evaluation.training import due, lines
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.base import Objective
from trireme_trainer.objectives.cross_entropy import IGNORED, ChunkedCrossEntropy
from trireme_trainer.objectives.masking import MaskingRule
from trireme_trainer.parallel.world import World

log = logging.getLogger(__name__)
_MASKS, _HELD_OUT = 3, 4
"""Purposes of keys, beside those of the mixture's documents and blocks."""
Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Tokens [T] of a block, those [T] the model gets, and the places to predict."""


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """`targets`: what was there at the places to predict, −100 elsewhere."""

    places: Tensor
    """[B·K], int64: those places, counted row by row over B·T, each row filled up to K with its first, which has no
    target. Equal shapes in every micro-batch, and no device is asked where its targets are."""

    def on(self, device: torch.device) -> Self:
        return replace(super().on(device), places=self.places.to(device, non_blocking=True))

    def pinned(self) -> Self:
        return replace(super().pinned(), places=self.places.pin_memory())


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
        special = self.mixture.special_tokens()
        self.begin = special.begin
        self._rule = MaskingRule(self._spec, special, self.vocabulary_size)
        self._key = derive(recipe.seed, _MASKS)
        self._held_out_key = derive(recipe.seed, _HELD_OUT)
        self._most = recipe.masks.places(recipe.data.sequence_length)
        self._valid = [self.mixture.valid_blocks(i) for i in range(len(self.mixture.parts))]

    def sample(self, global_index: int) -> Sample:
        """Raises DataError for a damaged shard."""
        tokens = np.concatenate([[self.begin], self.mixture.sample(global_index)])
        return tokens, *self._rule.apply(tokens, derive(self._key, *self.mixture.locate(global_index)))

    def held_out(self, source: int, block: int) -> Sample:
        """Of what a source holds out; the same each time. Raises DataError for a damaged shard."""
        tokens = np.concatenate([[self.begin], self._valid[source][block]])
        return tokens, *self._rule.apply(tokens, derive(self._held_out_key, source, block))

    def batch(self, samples: Sequence[Sample | None]) -> MaskedBatch:
        """None is padding: none of its targets count."""
        rows, length = len(samples), self.sequence_length
        tokens = np.full((rows, length), self.begin, dtype=np.int64)
        targets = np.full((rows, length), IGNORED, dtype=np.int64)
        places = np.repeat(np.arange(rows)[:, None] * length, self._most, axis=1)
        for row, sample in enumerate(samples):
            if sample is not None:
                block, tokens[row], chosen = sample
                targets[row, chosen] = block[chosen]
                places[row, : len(chosen)] += chosen
        return MaskedBatch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(places.flatten()))

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
        super().__init__(Share(recipe.sequences_per_step, world, recipe.batch.micro), rank, pin_memory)
        self._text = text

    def make(self, indices: list[int | None]) -> MaskedBatch:
        return self._text.batch([None if index is None else self._text.sample(index) for index in indices])


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
            self._held_out = MaskedHeldOut(self.samples, self._loss, sequences, spec.tokens)

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
        found = {"heldOut": self._held_out.run(model, self._world, alive), "tasks": []}
        for line in lines(found):
            log.info("evaluation: %s", line)
        return found
