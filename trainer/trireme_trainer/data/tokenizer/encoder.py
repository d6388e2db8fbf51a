"""What every tokenizer of a corpus is to the rest, and which of its ids stand for no text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3, as in OPT's vocabulary file."""
MASK_TOKEN = "<mask>"
"""The last id, as there: what the objective masked-lm hides text behind."""


@dataclass(frozen=True)
class SpecialTokens:
    ids: frozenset[int]
    """All of them, those below included."""
    mask: int
    begin: int
    """What a sequence begins with; the end-of-document token where there is none for it."""


class Encoder(ABC):
    """Documents to token ids."""

    file: str
    """What a corpus calls the tokenizer's file."""
    vocabulary: int
    """Ids run from 0 to vocabulary − 1."""
    sha256: str
    end_of_document: int
    ending: NDArray[np.uint32]
    """What comes after each document."""
    unknown: int | None = None
    """The id of what cannot be written; None where everything can, or that is not known."""

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocabulary <= 1 << 16 else "uint32"

    def encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Ids of each document, its ending with it."""
        return [np.concatenate([ids, self.ending]) for ids in self.text(texts)]

    @abstractmethod
    def text(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, nothing after it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...
