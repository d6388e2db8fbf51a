"""A mixture of feed-forward experts in place of one feed-forward layer. B batch, T time, S = B·T tokens, D width,
F inner width, E experts, K choices, C slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from trireme_api.families.mixture import Router as Rule

from trireme_trainer.layers.auxiliary import AuxiliaryLoss, scale_gradient
from trireme_trainer.layers.feed_forward import Activation, activate
from trireme_trainer.layers.routing import Router, Routing


class Exchange(Protocol):
    """Brings rows to the ranks that have their experts, and the results back. Each call is one for all these ranks."""

    def own(self, weight: Tensor) -> Tensor:
        """This rank's part of a weight, differentiable: its first dimension is the experts that are here."""

    def slotted(self, rows_ECD: Tensor, run: Callable[[Tensor], Tensor], *, alike: bool) -> Tensor:
        """`run` takes the rows of the experts that are here, in the places they have on their own ranks, one rank after
        the other. `alike`: C is the same on all ranks, which then need not ask each other. Returns ECD."""

    def grouped(self, rows_ND: Tensor, counts: list[int], run: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
        """The same for rows sorted by expert, `counts` for each of all experts. Returns ND."""


class Experts(nn.Module):
    """E feed-forward layers side by side: weights have the expert as their first dimension."""

    exchange: Exchange | None = None
    """Set where other ranks have some of the experts; then all of them call this module, equally often."""

    def __init__(
        self, experts: int, width: int, inner_width: int, activation: Activation, gradient_scale: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gradient_scale = gradient_scale
        self.fc1_weight = nn.Parameter(torch.empty(experts, inner_width, width))
        self.fc1_bias = nn.Parameter(torch.empty(experts, inner_width))
        self.fc2_weight = nn.Parameter(torch.empty(experts, width, inner_width))
        self.fc2_bias = nn.Parameter(torch.empty(experts, width))

    def forward(self, rows_ECD: Tensor) -> Tensor:
        if self.exchange is None:
            return self._slots(rows_ECD)
        return self.exchange.slotted(rows_ECD, self._slots, alike=self.training)

    def grouped(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts` for each, any number. Returns ND."""
        if self.exchange is None:
            return self._groups(rows_ND, counts)
        return self.exchange.grouped(rows_ND, counts, self._groups)

    def _slots(self, rows_ECD: Tensor) -> Tensor:
        fc1, bias1, fc2, bias2 = self._weights()
        inner = activate(torch.baddbmm(bias1[:, None], rows_ECD, fc1.transpose(1, 2)), self.activation)
        return torch.baddbmm(bias2[:, None], inner, fc2.transpose(1, 2))

    def _groups(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        each = (weight.unbind() for weight in self._weights())
        parts = []
        for rows, fc1, bias1, fc2, bias2 in zip(torch.split(rows_ND, counts), *each, strict=True):
            inner = activate(torch.addmm(bias1, rows, fc1.t()), self.activation)
            parts.append(torch.addmm(bias2, inner, fc2.t()))
        return torch.cat(parts)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights: list[Tensor] = [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if self.exchange is not None:
            weights = [self.exchange.own(weight) for weight in weights]
        fc1, bias1, fc2, bias2 = (scale_gradient(weight, self.gradient_scale) for weight in weights)
        return fc1, bias1, fc2, bias2


class MixtureOfExperts(nn.Module):
    """Each token's output is the weighted sum of its experts', which a router chooses; a token whose choices were all
    dropped has zero.

    With a limited capacity later tokens can push earlier ones out of an expert: training is not strictly causal there,
    as in the authors' code. Evaluation drops nothing by default.
    """

    def __init__(
        self,
        width: int,
        inner_width: int,
        experts: int,
        activation: Activation,
        *,
        capacity: Literal["limited", "dropless"],
        capacity_factor: float,
        evaluation_capacity: float,
        balance_weight: float,
        gradient_scale: float,
        router: Rule = "top-2",
    ) -> None:
        super().__init__()
        self.gate = Router(router, width, experts)
        self.experts = Experts(experts, width, inner_width, activation, gradient_scale)
        self.auxiliary = AuxiliaryLoss(balance_weight)
        self.dropless = capacity == "dropless"
        self.capacity_factor = capacity_factor
        self.evaluation_capacity = evaluation_capacity
        self.figures: Mapping[str, Tensor] = {}
        """Of the last forward pass."""

    def slots(self, tokens: int) -> int:
        """Places that each expert has for so many tokens."""
        if self.training:
            return max(1, int(self.capacity_factor * math.ceil(tokens / self.gate.experts)))
        return max(1, math.ceil(self.evaluation_capacity * tokens))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        x_SD = hidden_BTD.flatten(0, 1)
        slots = len(x_SD) if self.dropless else min(len(x_SD), self.slots(len(x_SD)))
        routing = self.gate(x_SD, slots)
        out_SD = self._sorted(x_SD, routing) if self.dropless else self._slotted(x_SD, routing, slots)
        self.figures = routing.figures()
        if routing.balance is not None:
            out_SD = self.auxiliary(out_SD, routing.balance)
        out_BTD: Tensor = out_SD.view_as(hidden_BTD)
        return out_BTD

    def _slotted(self, x_SD: Tensor, routing: Routing, slots: int) -> Tensor:
        """Shapes depend on nothing but S: compiles, and needs nothing of the host."""
        E, (S, D) = self.gate.experts, x_SD.shape
        nowhere = E * slots  # one row more takes what is dropped, and is never read
        row_SK = torch.where(routing.kept, routing.expert * slots + routing.position, nowhere)
        both = x_SD[:, None].expand(S, row_SK.shape[1], D).flatten(0, 1)
        rows = x_SD.new_zeros(nowhere + 1, D).index_copy(0, row_SK.flatten(), both)
        done = self.experts(rows[:-1].view(E, slots, D)).flatten(0, 1)
        return _combined(done[row_SK.clamp(max=nowhere - 1)], routing)

    def _sorted(self, x_SD: Tensor, routing: Routing) -> Tensor:
        K = routing.expert.shape[1]
        expert = routing.expert.flatten()
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=self.gate.experts).tolist()
        done = self.experts.grouped(x_SD[order // K], counts)
        return _combined(torch.empty_like(done).index_copy(0, order, done).view(-1, K, x_SD.shape[1]), routing)


def _combined(picked_SKD: Tensor, routing: Routing) -> Tensor:
    """Weighted over the choices: SD."""
    out: Tensor = (picked_SKD * routing.weight[..., None].to(picked_SKD.dtype)).sum(dim=1)
    return out
