"""The masked language model's rule (BERT, 1810.04805 §3.1; fairseq data/mask_tokens_dataset.py): what a recipe says of
it."""

from __future__ import annotations

from pydantic import Field, model_validator

from trireme_api.schema import Fraction, Spec

SHORTEST = 3
"""Tokens of the shortest block: the one it begins with, and two of text."""


class MaskingSpec(Spec):
    share: float = Field(default=0.15, gt=0, lt=1)
    """Of a block's tokens that are predicted; special tokens never are."""
    random: Fraction = 0.1
    """Share of the predicted tokens that another one, drawn evenly from the vocabulary, stands in for."""
    keep: Fraction = 0.1
    """Share of the predicted tokens that stay as they are. For the rest the mask token stands in."""

    @model_validator(mode="after")
    def _rest(self) -> MaskingSpec:
        if self.random + self.keep > 1:
            raise ValueError(f"random and keep must be at most 1 together; got {self.random} and {self.keep}")
        return self

    def places(self, sequence_length: int) -> int:
        """The most tokens of a block of `sequence_length` that are predicted: all but its first can be."""
        return int(self.share * (sequence_length - 1)) + 1
