"""How a rank of a test misbehaves: each is called in the rank before training, with its number."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trireme_trainer.objectives.causal_lm import CausalLM
from trireme_trainer.train import Stepper


def _poison(rank: int, bad_steps: set[int]) -> None:
    """The loss of rank 1 becomes NaN in the given steps (from 1)."""
    if rank != 1:
        return
    now = {"step": 0}
    plain_step, plain_loss = Stepper.step, CausalLM.__call__

    def step(self: Stepper, index: int) -> Any:
        now["step"] = index + 1
        return plain_step(self, index)

    def loss(self: CausalLM, *arguments: Any) -> Tensor:
        value = plain_loss(self, *arguments)
        return value * float("nan") if now["step"] in bad_steps else value

    Stepper.step = step  # type: ignore[method-assign]
    CausalLM.__call__ = loss  # type: ignore[method-assign]


def nan_in_step_3(rank: int) -> None:
    _poison(rank, {3})


def nan_from_step_3(rank: int) -> None:
    _poison(rank, set(range(3, 1000)))
