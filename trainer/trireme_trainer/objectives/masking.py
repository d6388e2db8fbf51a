"""What a masked language model does not get to see: a pure function of a block's tokens and a key."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from trireme_api.masking import MaskingSpec

from trireme_trainer.data.order import derive, shuffled, uniforms
from trireme_trainer.data.special import SpecialTokens

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
