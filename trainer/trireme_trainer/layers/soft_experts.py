"""Feed-forward layers side by side, all of them computed, weighed by a tree of softmax gates (2106.09563)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trireme_trainer.layers.feed_forward import Activation, FeedForward


class SoftExperts(nn.Module):
    """y = Σ_e share_e(x) · expert_e(x); the shares of a token sum to 1. BTD in and out.

    `tree`: which expert each split divided. Split i, from 0, gives a part of that expert's share to expert i + 1, by
    the softmax of gate i.
    """

    def __init__(self, width: int, inner_width: int, activation: Activation, tree: Sequence[int]) -> None:
        super().__init__()
        self.tree = tuple(tree)
        self.experts = nn.ModuleList(FeedForward(width, inner_width, activation) for _ in range(len(tree) + 1))
        self.gates = nn.ModuleList(nn.Linear(width, 2) for _ in tree)

    def shares(self, x_BTD: Tensor) -> list[Tensor]:
        """[BT1] for each expert, fp32."""
        shares = [torch.ones(*x_BTD.shape[:-1], 1, device=x_BTD.device)]
        for split, gate in zip(self.tree, self.gates, strict=True):
            stay, leave = gate(x_BTD).float().softmax(-1).split(1, dim=-1)
            shares.append(shares[split] * leave)
            shares[split] = shares[split] * stay
        return shares

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.tree:
            alone: Tensor = self.experts[0](x_BTD)
            return alone
        out = torch.zeros_like(x_BTD)
        for share, expert in zip(self.shares(x_BTD), self.experts, strict=True):
            out = out + share.to(x_BTD.dtype) * expert(x_BTD)
        return out
