"""The position-wise feed-forward sub-layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """fc2(relu(fc1(x))), with biases. BTD in and out."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner_width)
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.fc2(F.relu(self.fc1(hidden_BTD)))
        return out_BTD
