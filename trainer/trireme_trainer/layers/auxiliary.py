"""Losses that a layer adds by itself, such as the balance of experts, and figures it has to tell.

Such a loss enters the backward pass where it arises: what a layer returns stays one tensor, whatever wraps the layer
(sharding, recompute, compilation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class AuxiliaryLoss(nn.Module):
    """Adds `weight` times a layer's own loss to the training loss, as far as gradients go; the loss that is reported
    stays the objective's.

    A micro-batch has its share of the global step: `share` is set before each forward pass (see `set_share`).
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        # A plain attribute: a buffer would be given memory without values when the model is sharded.
        self.share: Tensor | None = None

    def forward(self, out: Tensor, loss: Tensor) -> Tensor:
        """`out` as it is; in the backward pass d(weight · share · loss) is added."""
        if not self.training or self.weight == 0.0 or not torch.is_grad_enabled():
            return out
        weighted = loss * self.weight
        if self.share is not None:
            weighted = weighted * self.share
        attached: Tensor = _Attach.apply(out, weighted)  # type: ignore[no-untyped-call]
        return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return gradients[0], torch.ones((), dtype=dtype, device=device)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """`value`, whose gradient is multiplied by `factor`."""
    if factor == 1.0:
        return value
    out: Tensor = _ScaleGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return out


def set_share(model: nn.Module, share: Tensor) -> None:
    """`share` []: valid tokens of this micro-batch over those of the global step, times fp16's loss scale if any."""
    for module in model.modules():
        if isinstance(module, AuxiliaryLoss):
            module.share = share


def mean_of(layers: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each figure's mean over the layers that told it."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {name: torch.stack([layer[name] for layer in layers if name in layer]).mean() for name in names}
