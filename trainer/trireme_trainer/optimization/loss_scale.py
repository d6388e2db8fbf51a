"""OPT's dynamic loss scaler for fp16 (arXiv 2205.01068 §2.5; metaseq's optim/dynamic_loss_scaler.py), on the device.

Gradients of fp16 activations underflow, so the loss is multiplied by a scale before backward and the gradients divided
by it after. Where they overflow instead, the step is skipped and the scale halved.

- An overflow, if their share since the last change is at least `tolerance`: scale / factor, not below `threshold`;
  window / factor, at least 1. A scale that would fall below `minimum` stays as it was, and steps go on being skipped.
- A good step whose distance from the last overflow is a multiple of the window: scale · factor and window · factor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from trireme_api.recipe import LossScaleSpec


class LossScaler:
    """Every rank computes the same from the same reduced norm, so nothing has to be agreed on."""

    NAMES = ("scale", "window", "step", "lastOverflow", "lastChange", "overflowsSinceChange")

    def __init__(self, spec: LossScaleSpec, device: torch.device) -> None:
        self._spec = spec
        start = [spec.initial, float(spec.window), 0.0, -1.0, -1.0, 0.0]
        # float64: scale and window are products of factors, the rest are counts; all stay exact.
        self._state = torch.tensor(start, dtype=torch.float64, device=device)

    @property
    def scale(self) -> Tensor:
        """[], float64."""
        return self._state[0]

    def update(self, overflow: Tensor) -> Tensor:
        """Takes note of one step; `overflow`: [], bool. Returns whether the scale was lowered: [], bool."""
        spec = self._spec
        scale, window, step, last_overflow, last_change, overflows = self._state.unbind()
        no_threshold = spec.threshold is None
        floor = scale.new_zeros(()) if no_threshold else torch.full_like(scale, float(spec.threshold or 0.0))

        counted = overflows + 1
        changes = counted / (step - last_change) >= spec.tolerance
        lower = torch.maximum(scale / spec.factor, floor)
        lower = torch.where(changes, lower, scale)
        lower = torch.where(lower < spec.minimum, scale, lower)
        narrower = torch.where(changes, torch.trunc(window / spec.factor).clamp(min=1), window)
        overflowed = [
            lower, narrower, step + 1, step, torch.where(changes, step, last_change),
            torch.where(changes, torch.zeros_like(counted), counted),
        ]  # fmt: skip

        grows = torch.remainder(step - last_overflow, window) == 0
        good = [
            torch.where(grows, scale * spec.factor, scale), torch.where(grows, window * spec.factor, window), step + 1,
            last_overflow, torch.where(grows, step, last_change), overflows,
        ]  # fmt: skip
        self._state = torch.where(overflow, torch.stack(overflowed), torch.stack(good))
        return overflow & (self._state[0] < scale)

    def saved(self) -> dict[str, float]:
        """For a checkpoint's meta; waits for the device."""
        return dict(zip(self.NAMES, self._state.tolist(), strict=True))

    def load(self, saved: dict[str, float]) -> None:
        values = [float(saved[name]) for name in self.NAMES]
        self._state = torch.tensor(values, dtype=torch.float64, device=self._state.device)
