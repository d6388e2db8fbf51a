"""Position tables."""

from __future__ import annotations

import math

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
        check_length(length, self.positions)
        if mask_BT is None:
            # A slice, not a look-up: its gradient needs no scatter, so it sums in the same order on every device.
            return self.weight[self.offset : self.offset + length]
        return F.embedding(rows_of(mask_BT, self.offset), self.weight, padding_idx=self.offset - 1)


class SinusoidalPositions(nn.Module):
    """Fixed vectors, no parameters: P[p] = [sin(p·r) | cos(p·r)], r_k = 10000^(-k / (D/2 - 1)), halves side by side as
    in tensor2tensor, not interleaved as in the Transformer paper (fairseq modules/sinusoidal_positional_embedding.py).

    The first token has p = `offset`; padding has the zero vector.
    """

    def __init__(self, positions: int, width: int, offset: int) -> None:
        super().__init__()
        self.positions = positions
        self.width = width
        self.offset = offset
        # A plain attribute: a buffer would lose its values when the sharded model is given memory.
        self._table: Tensor | None = None

    def forward(self, length: int, device: torch.device, mask_BT: Tensor | None = None) -> Tensor:
        """fp32 vectors of `length` tokens: TD where every token is real, BTD under a mask, which positions then skip.

        Raises ValueError if the sequence is longer than the model's positions.
        """
        check_length(length, self.positions)
        table = self._rows(length + self.offset, device)
        if mask_BT is None:
            return table[self.offset : self.offset + length]
        return F.embedding(rows_of(mask_BT, self.offset), table)

    def _rows(self, count: int, device: torch.device) -> Tensor:
        if self._table is None or len(self._table) < count or self._table.device != device:
            half = self.width // 2
            rates = torch.exp(torch.arange(half, device=device) * -(math.log(10000.0) / max(half - 1, 1)))
            angles = torch.arange(count, device=device)[:, None] * rates[None]
            table = torch.cat([angles.sin(), angles.cos()], dim=1)
            table = F.pad(table, (0, self.width - 2 * half))
            table[self.offset - 1] = 0.0
            self._table = table
        return self._table[:count]


def check_length(length: int, positions: int) -> None:
    if length > positions:
        raise ValueError(f"a sequence of {length} tokens is longer than the model's {positions} positions")


def rows_of(mask_BT: Tensor, offset: int) -> Tensor:
    """Table rows of the tokens of a padded batch: real ones count from `offset`, padding has the row before."""
    real_BT = mask_BT.long()
    return real_BT.cumsum(dim=1) * real_BT + (offset - 1)
