"""One transformer block, put together from its sub-layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """x += attention, x += feed-forward; LayerNorm before each (pre-LN), or after each sum (post-LN).

    The two sub-layers are whatever a family gives: `attention(hidden_BTD, attend_B1TT)` and `feed_forward(hidden_BTD)`,
    BTD each. NormFormer's (2110.09456) additions to a pre-LN block: `post_attention_norm`, a LayerNorm on what
    attention adds to the residual stream; `residual_scale`, a factor per channel on the stream that the feed-forward
    layer adds to.
    """

    def __init__(
        self, width: int, attention: nn.Module, feed_forward: nn.Module, *, dropout: float, pre_norm: bool = True,
        post_attention_norm: bool = False, residual_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not pre_norm and (post_attention_norm or residual_scale):
            raise ValueError("NormFormer's additions are to a pre-LN block")
        self.pre_norm = pre_norm
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward
        self.post_attention_norm = nn.LayerNorm(width) if post_attention_norm else None
        self.residual_scale = nn.Parameter(torch.empty(width)) if residual_scale else None

    def forward(self, x_BTD: Tensor, attend_B1TT: Tensor | None = None) -> Tensor:
        if self.pre_norm:
            attended_BTD = self.attention(self.attention_norm(x_BTD), attend_B1TT)
            if self.post_attention_norm is not None:
                attended_BTD = self.post_attention_norm(attended_BTD)
            x_BTD = x_BTD + self._drop(attended_BTD)
            stream_BTD = x_BTD if self.residual_scale is None else self.residual_scale * x_BTD
            x_BTD = stream_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))
        else:
            x_BTD = self.attention_norm(x_BTD + self._drop(self.attention(x_BTD, attend_B1TT)))
            x_BTD = self.feed_forward_norm(x_BTD + self._drop(self.feed_forward(x_BTD)))
        return x_BTD

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)
