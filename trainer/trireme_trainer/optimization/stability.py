"""Steps that are not finite, and loss spikes. The device decides whether a step counts; the host learns of it
afterwards, and decides whether to go on, to go back, or to end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from trireme_api.recipe import Recipe, StabilitySpec

from trireme_trainer.lifecycle.outcome import NonFinite
from trireme_trainer.optimization.history import History
from trireme_trainer.optimization.loss_scale import LossScaler

log = logging.getLogger(__name__)


class Verdict(IntEnum):
    GOOD = 0
    SPIKE = 1
    """Loss above `spikeRatio` × its mean over recent steps."""
    NON_FINITE = 2
    """Loss or gradient norm is not finite: the step never touches weights."""
    OVERFLOW = 3
    """fp16 only: gradients overflowed and the loss scale was lowered for it; part of how fp16 works."""


class RollBack(Exception):
    """Training must go back to before `step`. The text says why."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(why)
        self.step = step


@dataclass(frozen=True)
class Judgement:
    """All shape [], on the device."""

    verdict: Tensor
    """float64, a `Verdict`."""
    skip: Tensor
    """float32: 1.0 where the optimiser must change nothing."""
    expected: Tensor
    """float64: mean of recent losses; 0 before the first."""


class Stability:
    """One per rank. All decide alike: what they judge has been summed over all ranks already."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.spec: StabilitySpec = recipe.stability
        self.history = History()
        self.scaler = LossScaler(self.spec.loss_scale, device) if recipe.precision == "fp16" else None
        # Sum of losses and of weights, both decaying, and how many were taken in.
        self._recent = torch.zeros(3, dtype=torch.float64, device=device)
        self._in_a_row = 0

    @property
    def scale(self) -> Tensor | None:
        """What the loss is multiplied by; None but in fp16."""
        return self.scaler.scale if self.scaler else None

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Judgement:
        """On the device, without waiting for it. `loss` [] and `gradient_norm` [], reduced over all ranks."""
        spec = self.spec
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        total, weight, count = self._recent.unbind()
        expected = total / weight.clamp(min=1e-300)
        spike = finite & (count >= spec.spike_span) & (loss > spec.spike_ratio * expected)
        overflow = self.scaler.update(~torch.isfinite(gradient_norm)) if self.scaler else torch.zeros_like(finite)
        verdict = torch.where(finite, spike.double() * Verdict.SPIKE, float(Verdict.NON_FINITE))
        verdict = torch.where(overflow, float(Verdict.OVERFLOW), verdict)
        skip = ~finite | spike if spec.on_spike != "log" else ~finite
        decay = 1 - 2 / (spec.spike_span + 1)
        taken_in = torch.stack([total * decay + loss.double() * (1 - decay), weight * decay + 1 - decay, count + 1])
        self._recent = torch.where(skip, self._recent, taken_in)
        return Judgement(verdict, skip.to(torch.float32), expected)

    def skips(self, verdict: Verdict) -> bool:
        """Whether the device left the weights alone at a step with this verdict."""
        return verdict > Verdict.SPIKE or (verdict is Verdict.SPIKE and self.spec.on_spike != "log")

    def observe(self, step: int, verdict: Verdict, *, loss: float, gradient_norm: float, expected: float) -> None:
        """On the host, once the numbers of the step are there. Raises RollBack or NonFinite (exit 70)."""
        spec, skipped = self.spec, self.skips(verdict)
        if verdict is Verdict.OVERFLOW:
            log.info("step %d skipped: fp16 gradients overflowed, the loss scale was lowered", step)
            return
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if verdict is Verdict.GOOD:
            return
        what = f"step {step}: loss {loss}, gradient norm {gradient_norm}"
        if verdict is Verdict.SPIKE:
            what = f"step {step}: loss {loss:.4f} is {loss / expected:.2f} × the mean of recent steps, {expected:.4f}"
        log.warning("%s; %s", what, "skipped" if skipped else "went on (stability.onSpike is log)")
        if verdict is Verdict.SPIKE and spec.on_spike == "rollback":
            self._go_back(step, what)
        if verdict is Verdict.NON_FINITE and spec.on_non_finite == "stop":
            raise NonFinite(f"{what}; stability.onNonFinite is stop. Lower optimizer.learningRate, or set it to skip")
        if self._in_a_row >= spec.max_skipped_in_a_row:
            what = f"{what}; {self._in_a_row} steps in a row were skipped (stability.maxSkippedInARow)"
            if spec.on_non_finite == "rollback":
                self._go_back(step, what)
            raise NonFinite(f"{what}. Lower optimizer.learningRate or go back to an earlier checkpoint")

    def _go_back(self, step: int, what: str) -> None:
        if self.history.rollbacks >= self.spec.budget:
            raise NonFinite(
                f"{what}; {self.history.rollbacks} rollbacks are spent (stability.budget). Lower "
                "optimizer.learningRate or look at the data; a larger budget goes on from the newest checkpoint"
            )
        raise RollBack(step, what)

    def went_back(self, step: int, to: int) -> tuple[int, int]:
        """Enters a rollback from `step` steps done to `to` into the history. Returns the window of batches [first, end)
        that is left out from now on."""
        self._in_a_row = 0
        return self.history.roll_back(
            step, to, skip_window=self.spec.skip_window, learning_rate_factor=self.spec.lr_factor
        )

    def saved(self) -> dict[str, Any]:
        """For a checkpoint's meta: all that the next steps depend on, at any world size. Waits for the device."""
        total, weight, count = self._recent.tolist()
        recent = {"loss": total, "weight": weight, "count": count}
        scaler = {"lossScale": self.scaler.saved()} if self.scaler else {}
        return {"recent": recent, **scaler, "history": self.history.saved()}

    def load(self, meta: Mapping[str, Any]) -> None:
        """What `saved` put into a checkpoint; one without it (written before there was any) starts anew."""
        self.rewind(meta)
        self.history = History.load(meta.get("stability", {}).get("history", {}))

    def rewind(self, meta: Mapping[str, Any]) -> None:
        """The same but for the history, which does not go back when training does."""
        saved = meta.get("stability", {})
        recent = saved.get("recent", {})
        values = [float(recent.get(name, 0.0)) for name in ("loss", "weight", "count")]
        self._recent = torch.tensor(values, dtype=torch.float64, device=self._recent.device)
        if self.scaler and "lossScale" in saved:
            self.scaler.load(saved["lossScale"])
        elif self.scaler:
            self.scaler = LossScaler(self.spec.loss_scale, self._recent.device)
