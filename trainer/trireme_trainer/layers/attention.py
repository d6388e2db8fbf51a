"""Multi-head self-attention. Shapes: B batch, T time, D width, H heads, K head width."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadScale = Literal["none", "paper", "code"]
"""NormFormer's factor per head (2110.09456). paper: on the heads, before the output projection. code: on the result of
that projection, cut in as many slices, into each of which every head has gone."""


class SelfAttention(nn.Module):
    """Each token attends to all, or where `causal` to itself and to what precedes it; projections with biases.

    Queries are scaled by K^-0.5 inside the fused kernel, in its fp32 accumulators: what OPT's K^-0.25 on both queries
    and keys is for in half precision.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, *, causal: bool, head_scale: HeadScale = "none"
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.dropout = dropout
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.scale_after = head_scale == "code"
        self.head_scale = nn.Parameter(torch.empty(heads)) if head_scale != "none" else None

    def forward(self, hidden_BTD: Tensor, attend_B1TT: Tensor | None = None) -> Tensor:
        """`attend_B1TT`: which pairs attend, bool, causality included; left out: all that may. Returns BTD."""
        query, key, value = (self._heads(p(hidden_BTD)) for p in (self.q_proj, self.k_proj, self.v_proj))
        context_BHTK = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attend_B1TT,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and attend_B1TT is None,
        )
        context_BTHK = context_BHTK.transpose(1, 2)
        scale_H = self.scales()
        if scale_H is not None and not self.scale_after:
            context_BTHK = context_BTHK * scale_H[:, None]
        out_BTD: Tensor = self.out_proj(context_BTHK.flatten(2))
        if scale_H is not None and self.scale_after:
            out_BTD = (out_BTD.view(*out_BTD.shape[:2], len(scale_H), -1) * scale_H[:, None]).flatten(2)
        return out_BTD

    def scales(self) -> Tensor | None:
        """The factor of each head, if they have one."""
        return self.head_scale

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """As many as the projections give."""
        return x_BTD.view(*x_BTD.shape[:2], -1, self.head_width).transpose(1, 2)


def padding_mask(mask_BT: Tensor, *, causal: bool) -> Tensor:
    """Which pairs attend, [B, 1, T, T] bool, where `mask_BT` is non-zero on real tokens.

    Padding attends to itself: a row without any key would be NaN in some kernels, and nobody reads it.
    """
    T = mask_BT.shape[1]
    itself_TT = torch.eye(T, dtype=torch.bool, device=mask_BT.device)
    attend_B1TT = mask_BT.bool()[:, None, None, :] | itself_TT
    if not causal:
        return attend_B1TT
    return torch.ones(T, T, dtype=torch.bool, device=mask_BT.device).tril() & attend_B1TT
