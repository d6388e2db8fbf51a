"""Balanced assignment of tokens to experts: each expert takes equally many, the sum of affinities near its maximum.

An auction (Bertsekas 1992) on the device: tokens without an expert bid for the one that is worth most to them beyond
its price, an expert keeps its highest bids, and the lowest of these is its price. S tokens, E experts, C places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PRECISION = 200
"""The least raise of a bid is the range of affinities over this; the sum falls short by at most S raises."""
ROUNDS = 500
"""Afterwards the tokens that are left take the places that are left, in order: balanced still, and it always ends."""


@torch.library.custom_op("trireme::balanced_assignment", mutates_args=())
def balanced_assignment(affinity_SE: Tensor) -> Tensor:
    """The expert of each token, S, int64: ceil(S / E) tokens at most for each, S / E exactly where E divides S.

    One operation of torch: how often the auction loops depends on its data, which no compiled graph may.
    """
    S, E = affinity_SE.shape
    C = -(-S // E)
    # Tokens that nobody has fill the last places: all bids compete for just as many places as there are bidders.
    value_SE = F.pad(affinity_SE.float().nan_to_num(0.0, 0.0, 0.0), (0, 0, 0, C * E - S))
    if E == 1:
        return torch.zeros(S, dtype=torch.int64, device=affinity_SE.device)
    # With as many places as bidders, what an expert is worth to all alike decides nothing.
    value_SE = value_SE - value_SE.mean(dim=0)
    raised = torch.clamp((value_SE.max() - value_SE.min()) / PRECISION, min=1e-4)
    price_E = value_SE.new_zeros(E)
    bid_SE = torch.full_like(value_SE, -torch.inf)
    for _ in range(ROUNDS):
        free = (bid_SE == -torch.inf).all(dim=1).nonzero()[:, 0]
        if len(free) == 0:
            break
        worth = (value_SE[free] - price_E).topk(2, dim=1)
        wanted = worth.indices[:, 0]
        bid_SE[free, wanted] = price_E[wanted] + worth.values[:, 0] - worth.values[:, 1] + raised
        best_CE = bid_SE.topk(C, dim=0)
        bid_SE = torch.full_like(bid_SE, -torch.inf).scatter(0, best_CE.indices, best_CE.values)
        lowest_E = best_CE.values[-1]
        price_E = torch.where(lowest_E > -torch.inf, lowest_E, price_E)
    taken_SE = bid_SE > -torch.inf
    expert_S = taken_SE.int().argmax(dim=1)
    free = (~taken_SE.any(dim=1)).nonzero()[:, 0]
    open_E = C - taken_SE.sum(dim=0)
    expert_S[free] = torch.repeat_interleave(torch.arange(E, device=free.device), open_E)
    return expert_S[:S].clone()


@balanced_assignment.register_fake
def _(affinity_SE: Tensor) -> Tensor:
    return affinity_SE.new_empty(len(affinity_SE), dtype=torch.int64)
