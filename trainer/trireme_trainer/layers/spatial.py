"""Positions mixed by learned matrices instead of attention: gMLP's spatial gating unit (2105.08050), and with several
experts the sMoE of sparse all-MLP (2203.06850), a reconstruction.

B batch, T time, D width, H half of the inner width, E experts (as many chunks of H), C = H / E channels, N positions,
R = B·E chunks of all sequences, P prefix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trireme_trainer.layers.auxiliary import AuxiliaryLoss
from trireme_trainer.layers.embedding import check_length
from trireme_trainer.layers.routing import Router


class SpatialGating(nn.Module):
    """fc2(kept ⊙ gate), kept and gated = halves of gelu(fc1(x)), gate = W·LN(gated) + b along the positions.

    Each expert has a lower triangular W (N×N, of which a shorter sequence takes the leading part) and a b per position.
    H is cut into E chunks, one for each expert: deterministic routing, which needs no gate and sees nothing ahead.

    With a `prefix` of P > 0 positions (partial prediction), a top-1 gate sees each chunk's mean over the prefix and
    chooses the expert for the positions behind; its probability weighs what that expert mixes in, not its bias, so that
    the layer starts as fc2(kept). Positions in the prefix, and sequences no longer than it, go the deterministic way:
    nothing depends on what follows it, and every position can be predicted. (The paper predicts only what follows the
    prefix.)
    """

    def __init__(
        self, width: int, inner_width: int, positions: int, experts: int = 1, *, prefix: int = 0,
        balance_weight: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        half = inner_width // 2
        self.positions, self.experts, self.prefix = positions, experts, prefix
        self.fc1 = nn.Linear(width, inner_width)
        self.spatial_norm = nn.LayerNorm(half)
        # Experts one under the other: sharding cuts the first dimension, and one expert must not be one rank's alone.
        self.spatial_weight = nn.Parameter(torch.empty(experts * positions, positions))
        self.spatial_bias = nn.Parameter(torch.empty(experts * positions))
        self.spatial_gate = Router("top-1", half // experts, experts) if prefix else None
        self.auxiliary = AuxiliaryLoss(balance_weight)
        self.fc2 = nn.Linear(half, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """BTD in and out. Raises ValueError where the sequence is longer than the matrices."""
        check_length(hidden_BTD.shape[1], self.positions)
        kept_BTH, gated_BTH = F.gelu(self.fc1(hidden_BTD)).chunk(2, dim=-1)
        chunks_BTEC = self.spatial_norm(gated_BTH).unflatten(-1, (self.experts, -1))
        if self.spatial_gate is None or chunks_BTEC.shape[1] <= self.prefix:
            gate_BTEC = self._each_its_own(chunks_BTEC)
        else:
            gate_BTEC = self._chosen(chunks_BTEC, self.spatial_gate)
        out_BTD: Tensor = self.fc2(kept_BTH * gate_BTEC.flatten(2))
        return out_BTD

    def _matrices(self, length: int) -> tuple[Tensor, Tensor]:
        """(ETT, ET): of the leading positions, nothing above the diagonal."""
        weight_ENN = self.spatial_weight.view(self.experts, self.positions, self.positions)
        bias_EN = self.spatial_bias.view(self.experts, self.positions)
        return weight_ENN[:, :length, :length].tril(), bias_EN[:, :length]

    def _each_its_own(self, chunks_BTEC: Tensor) -> Tensor:
        B, T, E, C = chunks_BTEC.shape
        weight_ETT, bias_ET = self._matrices(T)
        columns = chunks_BTEC.permute(2, 1, 0, 3).reshape(E, T, B * C)
        mixed = torch.baddbmm(bias_ET[..., None], weight_ETT, columns)
        return mixed.view(E, T, B, C).permute(2, 1, 0, 3)

    def _chosen(self, chunks_BTEC: Tensor, gate: Router) -> Tensor:
        B, T, E, C = chunks_BTEC.shape
        weight_ETT, bias_ET = self._matrices(T)
        routing = gate(self._seen(chunks_BTEC).reshape(B * E, C), B * E)
        chosen_R, own_R = routing.expert[:, 0], torch.arange(E, device=chunks_BTEC.device).repeat(B)
        behind_T = torch.arange(T, device=chunks_BTEC.device) >= self.prefix
        expert_RT = torch.where(behind_T, chosen_R[:, None], own_R[:, None])
        row_T = torch.arange(T, device=chunks_BTEC.device)
        share_RT = torch.where(behind_T, routing.weight.to(chunks_BTEC.dtype), 1.0)
        columns_RTC = chunks_BTEC.transpose(1, 2).reshape(B * E, T, C)
        mixed_RTC = torch.bmm(weight_ETT[expert_RT, row_T], columns_RTC) * share_RT[..., None]
        gate_RTC = mixed_RTC + bias_ET[expert_RT, row_T][..., None]
        if routing.balance is not None:
            gate_RTC = self.auxiliary(gate_RTC, routing.balance)
        return gate_RTC.view(B, E, T, C).transpose(1, 2)

    def _seen(self, chunks_BTEC: Tensor) -> Tensor:
        """What the gate may see: BEC."""
        return chunks_BTEC[:, : self.prefix].mean(dim=1)


class GatingBlock(nn.Module):
    """x += gating, and in a sparse block x += `feed_forward`; LayerNorm before each."""

    def __init__(
        self, width: int, gating: SpatialGating, *, dropout: float, feed_forward: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.gating_norm = nn.LayerNorm(width)
        self.gating = gating
        self.feed_forward_norm = nn.LayerNorm(width) if feed_forward is not None else None
        self.feed_forward = feed_forward

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self._drop(self.gating(self.gating_norm(x_BTD)))
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x_BTD = x_BTD + self._drop(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)
