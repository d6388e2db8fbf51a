"""Throughput and utilisation: the family's arithmetic times measured tokens per second of steady state.

Steady state is time spent stepping, waiting for data included; the first step of a process (compile, allocator),
checkpoints and evaluation are outside. Formulae:

- model_tflops = tokens/s/device × 3 × forward FLOPs (causal-exact, activated parameters) / 1e12
- mfu      = model FLOP/s / peak
- mfu_palm = tokens/s/device × (6N + 12·L·H·Q·T) / peak (PaLM, 2204.02311 appendix B)
- hfu      = model FLOP/s plus recomputed blocks / peak (2205.05198)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trireme_api.devices import DevicePeak
from trireme_api.families import ModelConfig
from trireme_api.flops import TokenFlops
from trireme_api.recipe import Recipe

from trireme_trainer.telemetry.ledger import Ledger

WINDOW = 20
"""Steps that figures are averaged over."""
TERA = 1e12


@dataclass(frozen=True)
class Figures:
    """Of the last `WINDOW` steady steps; None where nothing can be said."""

    tokens_per_second: float | None = None
    """All devices together, valid tokens only."""
    step_seconds: float | None = None
    model_tflops: float | None = None
    """Per device."""
    mfu: float | None = None
    mfu_palm: float | None = None
    hfu: float | None = None


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of one trained token, and the peak they are measured against."""

    model: float
    hardware: float
    palm: float
    peak: float | None

    @classmethod
    def of(cls, config: ModelConfig, recipe: Recipe, device: DevicePeak | None) -> Arithmetic:
        flops = TokenFlops.of(config, recipe)
        return cls(flops.model, flops.hardware, flops.palm, device.of(recipe.precision) if device else None)

    def figures(self, tokens: float, seconds: float, steps: int, devices: int) -> Figures:
        """`tokens` valid tokens trained by `devices` devices in `seconds`."""
        if seconds <= 0 or steps <= 0:
            return Figures()
        rate = tokens / seconds / devices
        peak = self.peak
        return Figures(
            tokens_per_second=tokens / seconds,
            step_seconds=seconds / steps,
            model_tflops=rate * self.model / TERA,
            mfu=rate * self.model / peak if peak else None,
            mfu_palm=rate * self.palm / peak if peak else None,
            hfu=rate * self.hardware / peak if peak else None,
        )


class Meter:
    """Figures of the newest steady steps, on the ledger's time. `step_done` closes a step: the time that the ledger has
    booked as the loop's own work since the step before is that step's; checkpoints and evaluation are not in it."""

    def __init__(self, arithmetic: Arithmetic, devices: int, ledger: Ledger) -> None:
        self._arithmetic = arithmetic
        self._devices = devices
        self._ledger = ledger
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._mark = 0.0
        self._first = True

    def counts(self, arithmetic: Arithmetic) -> None:
        """From now on by this arithmetic: the model has grown."""
        self._arithmetic = arithmetic

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of this process by ledger state."""
        return self._ledger.seconds

    def begin(self) -> None:
        """The loop begins: what follows, up to the end of the first step, is `compile`."""
        self._ledger.enter("compile")
        self._mark = self._ledger.training

    def step_done(self, tokens: float) -> float:
        """Closes a step of `tokens` valid tokens (all ranks). Its seconds."""
        now = self._ledger.training
        seconds, self._mark = now - self._mark, now
        if self._first:
            self._first = False
            self._ledger.enter("step")
        else:
            self._steps.append((tokens, seconds))
        return seconds

    def figures(self) -> Figures:
        tokens, seconds = (sum(column) for column in zip(*self._steps, strict=True)) if self._steps else (0.0, 0.0)
        return self._arithmetic.figures(tokens, seconds, len(self._steps), self._devices)
