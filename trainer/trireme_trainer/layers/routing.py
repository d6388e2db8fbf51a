"""Which expert takes which token. Pure functions. S tokens, E experts, K choices of each token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    expert: Tensor
    """The choices, SK, int64."""
    position: Tensor
    """Place in the expert's queue, SK, int64, from 0."""
    weight: Tensor
    """SK, fp32; 0 where dropped. Of a token: 1 in all, or 0 where every choice was dropped."""
    kept: Tensor
    """SK, bool: the place is within the capacity."""
    balance: Tensor
    """[]: 1 where experts are used evenly, E where one takes everything."""

    def figures(self, logits_SE: Tensor) -> dict[str, Tensor]:
        """Share of choices dropped; load of the busiest expert over the mean; entropy of the gate, in nats."""
        with torch.no_grad():
            experts = logits_SE.shape[1]
            load_E = F.one_hot(self.expert, experts).sum(dim=(0, 1)).float()
            log_SE = F.log_softmax(logits_SE.float(), dim=1)
            return {
                "balanceLoss": self.balance.detach(),
                "expertOverflow": 1.0 - self.kept.float().mean(),
                "expertLoad": load_E.max() / load_E.mean(),
                "gateEntropy": -(log_SE.exp() * log_SE).sum(dim=1).mean(),
            }


def top_2(logits_SE: Tensor, capacity: int) -> Routing:
    """fairseq's top-2 gate without noise (moe branch, modules/moe/top2gate.py, `--moe-second-expert-policy all`).

    The second choice is the best of the other experts. Second choices queue after all first ones; places beyond
    `capacity` are dropped; then what is left of a token's two probabilities is made to sum to 1.
    """
    experts = logits_SE.shape[1]
    logits_SE = logits_SE.float()
    gates_SE = F.softmax(logits_SE, dim=1)
    first_S = logits_SE.argmax(dim=1)
    first_SE = F.one_hot(first_S, experts)
    second_S = logits_SE.masked_fill(first_SE.bool(), -math.inf).argmax(dim=1)
    second_SE = F.one_hot(second_S, experts)
    expert_SK = torch.stack([first_S, second_S], dim=1)
    queue_SE = (first_SE.cumsum(dim=0) - 1, second_SE.cumsum(dim=0) - 1 + first_SE.sum(dim=0))
    position_SK = torch.cat([queue_SE[k].gather(1, expert_SK[:, k : k + 1]) for k in range(2)], dim=1)
    kept_SK = position_SK < capacity
    weight_SK = gates_SE.gather(1, expert_SK) * kept_SK
    weight_SK = weight_SK / weight_SK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    # Only the first choice counts, and its mask has no gradient: the probabilities carry it.
    balance = experts * (gates_SE.mean(dim=0) * first_SE.float().mean(dim=0)).sum()
    return Routing(expert_SK, position_SK, weight_SK, kept_SK, balance)
