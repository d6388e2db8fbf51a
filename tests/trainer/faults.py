"""How a rank of a test misbehaves: each is called in the rank before training, with its number."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from trireme_trainer.objectives.causal_lm import CausalLM
from trireme_trainer.optim import Optimizer


def nan_in_step_3(rank: int) -> None:
    """One number of rank 1's gradients becomes NaN in the third step; losses stay finite."""
    if rank != 1:
        return
    plain, calls = Optimizer.clip, []

    def clip(self: Optimizer) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            gradient = self._parameters[0].grad
            assert isinstance(gradient, DTensor)
            gradient.to_local()[0, 0] = float("nan")
        return plain(self)

    Optimizer.clip = clip  # type: ignore[method-assign]


def nan_from_step_3(rank: int) -> None:
    """Rank 1's loss becomes NaN from the third step on; its gradients stay finite. Six micro-batches make two steps."""
    if rank != 1:
        return
    plain, calls = CausalLM.__call__, []

    def loss(self: CausalLM, *arguments: Any) -> Tensor:
        calls.append(1)
        value = plain(self, *arguments)
        return value * float("nan") if len(calls) > 6 else value

    CausalLM.__call__ = loss  # type: ignore[method-assign]
