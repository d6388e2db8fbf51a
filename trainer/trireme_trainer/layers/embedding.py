"""Position tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """A learned vector per position. The rows before `offset` belong to padding (row offset - 1) or to nothing."""

    def __init__(self, positions: int, width: int, offset: int) -> None:
        super().__init__()
        self.positions = positions
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(positions + offset, width))

    def forward(self, length: int, mask_BT: Tensor | None = None) -> Tensor:
        """Vectors of `length` tokens: TD where every token is real, BTD under a mask, which positions then skip.

        Raises ValueError if the sequence is longer than the table.
        """
        if length > self.positions:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's {self.positions} positions")
        if mask_BT is None:
            # A slice, not a look-up: its gradient needs no scatter, so it sums in the same order on every device.
            return self.weight[self.offset : self.offset + length]
        real_BT = mask_BT.long()
        rows_BT = real_BT.cumsum(dim=1) * real_BT + (self.offset - 1)
        return F.embedding(rows_BT, self.weight, padding_idx=self.offset - 1)
