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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.devices import DevicePeak

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
        length = recipe.data.sequence_length
        return cls(
            model=config.train_flops_per_token(length),
            hardware=config.hardware_flops_per_token(
                length, activation_checkpointing=recipe.activation_checkpointing
            ),
            palm=config.palm_flops_per_token(length),
            peak=device.of(recipe.precision) if device else None,
        )

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
    """Wall time by what it went into, and the figures of the newest steady steps.

    `with meter.outside("checkpoint"):` takes the time in it out of the steady state. `step_done` closes a step: what
    passed since the step before, less what was outside, is that step's time.
    """

    def __init__(self, arithmetic: Arithmetic, devices: int) -> None:
        self._arithmetic = arithmetic
        self._devices = devices
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._mark = perf_counter()
        self._outside = 0.0
        self._first = True
        self.seconds = dict.fromkeys(("step", "compile", "data-wait", "checkpoint-blocked", "eval"), 0.0)
        """Since training began, by ledger label; `compile` is the whole first step of this process."""

    @contextmanager
    def outside(self, label: str) -> Iterator[None]:
        begin = perf_counter()
        try:
            yield
        finally:
            spent = perf_counter() - begin
            self._outside += spent
            self.seconds[label] = self.seconds.get(label, 0.0) + spent

    def begin(self) -> None:
        """Time counts from here: call where the loop begins."""
        self._mark, self._outside = perf_counter(), 0.0

    def step_done(self, tokens: float, data_wait: float) -> float:
        """Closes a step of `tokens` valid tokens (all ranks), `data_wait` seconds of it spent waiting. Its seconds."""
        now = perf_counter()
        seconds = max(now - self._mark - self._outside, 0.0)
        self._mark, self._outside = now, 0.0
        self.seconds["data-wait"] += data_wait
        if self._first:
            self._first = False
            self.seconds["compile"] += seconds - data_wait
        else:
            self.seconds["step"] += seconds - data_wait
            self._steps.append((tokens, seconds))
        return seconds

    def figures(self) -> Figures:
        tokens, seconds = (sum(column) for column in zip(*self._steps, strict=True)) if self._steps else (0.0, 0.0)
        return self._arithmetic.figures(tokens, seconds, len(self._steps), self._devices)
