"""Which expert takes which token. S tokens, E experts, K choices of each token, D width.

A `Router` gives assignment and weights; whoever has experts sends the tokens there. The rules are pure functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trireme_api.families.mixture import Router as Rule

from trireme_trainer.layers.assignment import balanced_assignment


@dataclass(frozen=True)
class Routing:
    expert: Tensor
    """The choices, SK, int64."""
    position: Tensor
    """Place in the expert's queue, SK, int64, from 0."""
    weight: Tensor
    """SK, fp32; 0 where dropped."""
    kept: Tensor
    """SK, bool: the place is within the capacity."""
    experts: int
    balance: Tensor | None = None
    """[]: 1 where experts are used evenly, E where one takes everything; of rules that have such a loss."""
    logits: Tensor | None = None
    """SE, of rules whose weights are a softmax of them."""

    def figures(self) -> dict[str, Tensor]:
        """Share of choices dropped; load of the busiest expert over the mean; where there is one, the balance loss, and
        the entropy of the gate in nats."""
        with torch.no_grad():
            load_E = F.one_hot(self.expert, self.experts).sum(dim=(0, 1)).float()
            told = {
                "expertOverflow": 1.0 - self.kept.float().mean(),
                "expertLoad": load_E.max() / load_E.mean(),
            }
            if self.balance is not None:
                told["balanceLoss"] = self.balance.detach()
            if self.logits is not None:
                log_SE = F.log_softmax(self.logits, dim=1)
                told["gateEntropy"] = -(log_SE.exp() * log_SE).sum(dim=1).mean()
            return told


class Router(nn.Module):
    """The rules by name (`MixtureConfig.router`). A weight, where the rule has one: ED, a row per expert."""

    def __init__(self, rule: Rule, width: int, experts: int) -> None:
        super().__init__()
        self.rule = rule
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts, width)) if rule != "hash" else None
        # Set before each forward pass, see `tell_tokens`; no buffer, as it is nobody's state.
        self.tokens_S: Tensor | None = None

    def forward(self, x_SD: Tensor, capacity: int) -> Routing:
        """`capacity`: places of each expert."""
        if self.weight is None:
            assert self.tokens_S is not None, "a hash chooses by the tokens: tell_tokens first"
            return hashed(self.tokens_S, self.experts, capacity)
        # fp32, whatever the rest is in: near ties must not fall by rounding (`--moe-gating-use-fp32`).
        logits_SE = F.linear(x_SD.float(), self.weight.float())
        match self.rule:
            case "top-1":
                return top_1(logits_SE, capacity)
            case "base":
                return base(logits_SE, capacity, balanced=self.training)
        return top_2(logits_SE, capacity)


def tell_tokens(model: nn.Module, tokens_BT: Tensor) -> None:
    """What this forward pass is about, for routers that choose by the token itself."""
    for module in model.modules():
        if isinstance(module, Router) and module.rule == "hash":
            module.tokens_S = tokens_BT.flatten()


def top_2(logits_SE: Tensor, capacity: int) -> Routing:
    """fairseq's top-2 gate without noise (moe branch, modules/moe/top2gate.py, `--moe-second-expert-policy all`), after
    GShard (2006.16668).

    The second choice is the best of the other experts. Second choices queue after all first ones; places beyond
    `capacity` are dropped; then what is left of a token's two probabilities is made to sum to 1.
    """
    experts = logits_SE.shape[1]
    gates_SE = F.softmax(logits_SE, dim=1)
    first_S = logits_SE.argmax(dim=1)
    second_S = logits_SE.masked_fill(F.one_hot(first_S, experts).bool(), -math.inf).argmax(dim=1)
    expert_SK = torch.stack([first_S, second_S], dim=1)
    position_SK, kept_SK = _queued(expert_SK, experts, capacity)
    weight_SK = gates_SE.gather(1, expert_SK) * kept_SK
    weight_SK = weight_SK / weight_SK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return Routing(expert_SK, position_SK, weight_SK, kept_SK, experts, _balance(gates_SE, first_S), logits_SE)


def top_1(logits_SE: Tensor, capacity: int) -> Routing:
    """Switch's gate (2101.03961 §2.2) without noise: the most probable expert, weighted by its probability."""
    experts = logits_SE.shape[1]
    gates_SE = F.softmax(logits_SE, dim=1)
    expert_SK = logits_SE.argmax(dim=1, keepdim=True)
    position_SK, kept_SK = _queued(expert_SK, experts, capacity)
    weight_SK = gates_SE.gather(1, expert_SK) * kept_SK
    balance = _balance(gates_SE, expert_SK[:, 0])
    return Routing(expert_SK, position_SK, weight_SK, kept_SK, experts, balance, logits_SE)


def base(affinity_SE: Tensor, capacity: int, *, balanced: bool) -> Routing:
    """BASE layers (2103.16716; fairseq modules/base_layer.py): each expert gets equally many tokens, by an assignment
    that knows no gradient; or, not `balanced`, each token its nearest expert. Weighted by the sigmoid of the affinity,
    which is all that centroids learn from.

    A balanced token may move because of a later one: training is not strictly causal, as in the authors' code.
    """
    experts, known_SE = affinity_SE.shape[1], affinity_SE.detach()
    expert_S: Tensor = balanced_assignment(known_SE) if balanced else known_SE.argmax(dim=1)
    expert_SK = expert_S[:, None]
    position_SK, kept_SK = _queued(expert_SK, experts, capacity)
    weight_SK = affinity_SE.gather(1, expert_SK).sigmoid() * kept_SK
    return Routing(expert_SK, position_SK, weight_SK, kept_SK, experts)


def hashed(tokens_S: Tensor, experts: int, capacity: int) -> Routing:
    """HASH layers (2106.04426) with a fixed hash of the token's number; nothing is learnt, and a weight is 1."""
    expert_SK = _mixed(tokens_S)[:, None] % experts
    position_SK, kept_SK = _queued(expert_SK, experts, capacity)
    return Routing(expert_SK, position_SK, kept_SK.float(), kept_SK, experts)


def _mixed(numbers: Tensor) -> Tensor:
    """32 bits scattered over 32 bits, the same on every device: multiply and fold, twice."""
    bits = 0xFFFFFFFF
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & bits
    return numbers ^ (numbers >> 16)


def _queued(expert_SK: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """(position, kept): an expert's queue has all first choices, in the order of tokens, then all second ones."""
    positions = []
    before_E = expert_SK.new_zeros(experts)
    for expert_S in expert_SK.unbind(dim=1):
        chosen_SE = F.one_hot(expert_S, experts)
        queue_SE = chosen_SE.cumsum(dim=0) - 1 + before_E
        positions.append(queue_SE.gather(1, expert_S[:, None]))
        before_E = before_E + chosen_SE.sum(dim=0)
    position_SK = torch.cat(positions, dim=1)
    return position_SK, position_SK < capacity


def _balance(gates_SE: Tensor, first_S: Tensor) -> Tensor:
    """Only the first choice counts, and its mask has no gradient: the probabilities carry it."""
    experts = gates_SE.shape[1]
    share_E = F.one_hot(first_S, experts).float().mean(dim=0)
    return experts * (gates_SE.mean(dim=0) * share_E).sum()
