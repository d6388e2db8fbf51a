"""What a masked language model does not get to see: a pure function of a block's tokens and a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trireme_api.masking import MaskingSpec

from trireme_trainer.data.batches import IGNORED, Batch
from trireme_trainer.data.order import derive, shuffled, uniforms
from trireme_trainer.data.tokenizer import SpecialTokens

Sample = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Tokens [T] of a block, those [T] the model gets, and the places to predict."""
_COUNT, _CHOICE, _KIND, _OTHER = range(4)
"""Purposes of keys."""


class MaskingRule:
    """Of n tokens that are not special, ⌊share·n + u⌋ are predicted, u drawn from [0, 1) for each block, so that the
    share is met in the mean. Each of them is hidden behind the mask token, or replaced by any other token, special ones
    excepted (it may be the same one), or kept (fairseq data/mask_tokens_dataset.py; it may choose special tokens,
    this does not)."""

    def __init__(self, spec: MaskingSpec, special: SpecialTokens, vocabulary: int) -> None:
        self._spec = spec
        self._mask = special.mask
        self._special = np.zeros(vocabulary, dtype=np.bool_)
        self._special[list(special.ids)] = True
        self._others = np.flatnonzero(~self._special)

    def apply(self, tokens: NDArray[np.int64], key: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`tokens` [T] as the model gets them, and the places to predict, ascending."""
        spec = self._spec
        candidates = np.flatnonzero(~self._special[tokens])
        count = int(spec.share * len(candidates) + uniforms(1, derive(key, _COUNT))[0])
        order = shuffled(len(candidates), derive(key, _CHOICE))
        chosen = np.sort(candidates[order[:count]])
        kind = uniforms(len(chosen), derive(key, _KIND))
        replaced = chosen[kind < spec.random]
        drawn = uniforms(len(replaced), derive(key, _OTHER)) * len(self._others)
        seen = tokens.copy()
        seen[chosen[kind >= spec.random + spec.keep]] = self._mask
        seen[replaced] = self._others[drawn.astype(np.int64)]
        return seen, chosen


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


class MaskedBlocks:
    """Blocks of T tokens, the first of them the one that begins a sequence, of which some are to be predicted."""

    def __init__(self, spec: MaskingSpec, special: SpecialTokens, vocabulary: int, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.begin = special.begin
        self._rule = MaskingRule(spec, special, vocabulary)
        self._most = spec.places(sequence_length)

    @property
    def words(self) -> int:
        """Tokens of text in a block."""
        return self.sequence_length - 1

    def sample(self, words: NDArray[np.int64], key: int) -> Sample:
        tokens = np.concatenate([[self.begin], words])
        return tokens, *self._rule.apply(tokens, key)

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
