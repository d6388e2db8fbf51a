"""What happens when a step is not finite. The device decides whether it counts; the host learns of it afterwards."""

from __future__ import annotations

import torch
from torch import Tensor
from trireme_api.recipe import StabilitySpec

from trireme_trainer.outcome import NonFinite


def non_finite(loss: Tensor, gradient_norm: Tensor) -> Tensor:
    """1.0 where loss or norm (both [], reduced over all ranks already, so that all decide alike) is not finite, else 0.

    Shape [], float32, on the device of `loss`: the optimiser kernel reads it there, the host does not wait.
    """
    return (~(torch.isfinite(loss) & torch.isfinite(gradient_norm))).to(torch.float32)


class NonFinitePolicy:
    """Counts skipped steps and ends the run (exit code 70) where the recipe says so."""

    def __init__(self, spec: StabilitySpec) -> None:
        self._spec = spec
        self.skipped = 0
        self._in_a_row = 0

    def observe(self, step: int, *, skipped: bool, loss: float, gradient_norm: float) -> None:
        """Raises NonFinite naming the step and the remedy."""
        if not skipped:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        what = f"step {step}: loss {loss}, gradient norm {gradient_norm}"
        if self._spec.on_non_finite == "stop":
            raise NonFinite(f"{what}; stability.onNonFinite is stop. Lower optimizer.learningRate, or set it to skip")
        if self._in_a_row >= self._spec.max_skipped_in_a_row:
            raise NonFinite(
                f"{what}; {self._in_a_row} steps in a row were skipped (stability.maxSkippedInARow). "
                "Lower optimizer.learningRate or go back to an earlier checkpoint"
            )
