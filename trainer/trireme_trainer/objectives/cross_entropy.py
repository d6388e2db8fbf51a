"""Cross-entropy over a large vocabulary: summed over targets that count, divided by those of the whole global step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trireme_api.families.memory import LOGITS_BYTES, positions_at_once

from trireme_trainer.families import LanguageModel, Project

IGNORED = -100
"""Target of a position that does not count."""


class ChunkedCrossEntropy:
    """The output layer and its cross-entropy are taken chunk by chunk over positions, each chunk's backward pass run at
    once: no more than one chunk of logits exists, and none is computed twice. This runs inside the model's forward
    pass, while sharding holds the output layer's weights gathered. The returned loss, shape [], fp32, must be
    back-propagated as it is (gradient 1), once.
    """

    def __init__(
        self, vocabulary_size: int, *, compile_backend: str | None = None, chunk_bytes: int = LOGITS_BYTES
    ) -> None:
        self._chunk = positions_at_once(vocabulary_size, chunk_bytes)
        self._cross_entropy: Callable[[Tensor, Tensor], Tensor] = summed_cross_entropy
        if compile_backend is not None:
            self._cross_entropy = torch.compile(summed_cross_entropy, backend=compile_backend)

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, targets_N: Tensor, valid: Tensor, scale: Tensor | None,
        places_N: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`places_N`: which of the B·T positions, counted row by row, have logits at all; left out: each. `valid`:
        number of valid targets of the global step, shape [], at least 1. `scale`: [], of fp16 gradients alone: the
        loss that is returned is without it, what its backward pass gives is with it."""

        def head(hidden_BTD: Tensor, project: Project) -> Tensor:
            hidden = hidden_BTD.flatten(0, 1)
            if places_N is not None:
                hidden = hidden.index_select(0, places_N)
            shared = model.shared_positions
            own, targets = (hidden, targets_N) if shared is None else (shared.own(hidden), shared.own(targets_N))
            backward = torch.is_grad_enabled() and hidden.requires_grad
            with torch.set_grad_enabled(backward):
                # Weights have the gradient of this rank's positions alone, and it will be divided by the ranks.
                factor = scale if shared is None else shared.ranks * (1.0 if scale is None else scale)
                loss, gradient = self._sum(own.detach(), targets, project, valid, factor, backward=backward)
            if shared is not None:
                loss = shared.sum(loss)
                gradient = None if gradient is None else shared.all(gradient / shared.ranks, len(hidden))
            if gradient is None:
                return loss
            out: Tensor = _Precomputed.apply(hidden, loss, gradient)  # type: ignore[no-untyped-call]
            return out

        out: Tensor = model(tokens_BT, head)
        return out

    def _sum(
        self, hidden_ND: Tensor, targets_N: Tensor, project: Project, valid: Tensor, factor: Tensor | float | None, *,
        backward: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and where `backward` the gradient of `factor` times it."""
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradients = []
        chunks = zip(torch.split(hidden_ND, self._chunk), torch.split(targets_N, self._chunk), strict=True)
        for hidden, targets in chunks:
            part = hidden.detach().requires_grad_(backward)
            loss = self._cross_entropy(project(part), targets) / valid
            if backward:
                (loss if factor is None else loss * factor).backward()  # type: ignore[no-untyped-call]
                assert part.grad is not None
                gradients.append(part.grad)
            total += loss.detach()
        return total, torch.cat(gradients) if backward else None


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """In fp32 whatever the logits are."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")


class _Precomputed(torch.autograd.Function):
    """A loss whose gradient with respect to `hidden` is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()  # a view of an input would lose FSDP's hook

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None
