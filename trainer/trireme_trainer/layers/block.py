"""One transformer block, put together from its sub-layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """x += attention, x += feed-forward; LayerNorm before each (pre-LN), or after each sum (post-LN).

    The two sub-layers are whatever a family gives: `attention(hidden_BTD, attend_B1TT)` and `feed_forward(hidden_BTD)`,
    BTD each.
    """

    def __init__(
        self, width: int, attention: nn.Module, feed_forward: nn.Module, *, dropout: float, pre_norm: bool = True
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward

    def forward(self, x_BTD: Tensor, attend_B1TT: Tensor | None = None) -> Tensor:
        if self.pre_norm:
            x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), attend_B1TT))
            x_BTD = x_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))
        else:
            x_BTD = self.attention_norm(x_BTD + self._drop(self.attention(x_BTD, attend_B1TT)))
            x_BTD = self.feed_forward_norm(x_BTD + self._drop(self.feed_forward(x_BTD)))
        return x_BTD

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)
