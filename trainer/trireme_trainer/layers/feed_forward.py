"""The position-wise feed-forward sub-layer."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "gelu"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """gelu: exact, by the error function; not its tanh approximation."""
    return F.relu(x) if kind == "relu" else F.gelu(x)


class FeedForward(nn.Module):
    """fc2(activation(fc1(x))), with biases. BTD in and out."""

    def __init__(self, width: int, inner_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner_width)
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.fc2(activate(self.fc1(hidden_BTD), self.activation))
        return out_BTD
