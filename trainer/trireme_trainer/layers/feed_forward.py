"""The position-wise feed-forward sub-layer."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "relu2"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """gelu: exact, by the error function; not its tanh approximation. relu2: ReLU squared."""
    match kind:
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
    return F.gelu(x)


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))), with biases. BTD in and out. `inner_norm`: a LayerNorm between activation and fc2, as
    in NormFormer."""

    def __init__(self, width: int, inner_width: int, activation: Activation, *, inner_norm: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner_width)
        self.inner_norm = nn.LayerNorm(inner_width) if inner_norm else None
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        inner_BTF = activate(self.fc1(hidden_BTD), self.activation)
        if self.inner_norm is not None:
            inner_BTF = self.inner_norm(inner_BTF)
        out_BTD: Tensor = self.fc2(inner_BTF)
        return out_BTD
