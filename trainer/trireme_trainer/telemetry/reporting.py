"""Tells how training goes: the agent (heartbeat), Prometheus, the step log, and a person at the console."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trireme_api.protocol import CheckpointRef, Progress
from trireme_api.recipe import Recipe

from trireme_trainer.optimization.history import History
from trireme_trainer.optimization.stability import RollBack
from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.logbook import Logbook
from trireme_trainer.telemetry.metering import Figures, Meter
from trireme_trainer.telemetry.metrics import TrainMetrics

log = logging.getLogger(__name__)
CONSOLE_SECONDS = 1.0
"""At most one line per so many seconds, so that tiny models do not drown the log."""


class Reporter:
    """Every rank beats, with the same progress, for all know it; global rank 0 alone logs, counts and prints."""

    def __init__(
        self, recipe: Recipe, pulse: Pulse, meter: Meter, logbook: Logbook | None, metrics: TrainMetrics | None
    ) -> None:
        self.pulse = pulse
        self.ledger = pulse.ledger
        self.meter = meter
        self._recipe = recipe
        self._logbook = logbook
        self._metrics = metrics
        self._printed = 0.0
        self._skipped = self._spikes = 0
        self.rollbacks = 0
        """Of the whole run, as far as its checkpoints tell."""

    def step(
        self,
        step: int,
        *,
        loss: float,
        gradient_norm: float,
        learning_rate: float,
        valid: float,
        skipped: bool,
        spike: bool = False,
        loss_scale: float | None = None,
        figures: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`step`: optimiser steps done; `valid`: tokens that counted, all ranks; `figures`: what layers tell, for the
        step log alone."""
        self._skipped += skipped
        self._spikes += spike
        seconds = self.meter.step_done(valid)
        self.ledger.stepped(step)
        speed = self.meter.figures()
        progress = Progress(
            step=step,
            total_steps=self._recipe.total_steps,
            tokens=step * self._recipe.batch.tokens,
            loss=finite(loss),
            tokens_per_second=speed.tokens_per_second,
            tflops=speed.model_tflops,
            mfu=speed.mfu,
            grad_norm=finite(gradient_norm),
            learning_rate=learning_rate,
            skipped_steps=self._skipped,
            spikes=self._spikes,
            rollbacks=self.rollbacks,
            loss_scale=loss_scale,
        )
        self.pulse.beat("step", step=step, progress=progress)
        if self._metrics:
            self._metrics.step(progress, speed, self.meter, tokens=valid, seconds=seconds, skipped=skipped)
            self._metrics.stability(progress, spike=spike)
        if self._logbook:
            self._logbook.step(
                step=step, loss=finite(loss), gradNorm=finite(gradient_norm), lr=learning_rate, tokens=progress.tokens,
                seconds=round(seconds, 6), **_known(speed), **({"skipped": True} if skipped else {}),
                **({"spike": True} if spike else {}), **({"lossScale": loss_scale} if loss_scale is not None else {}),
                **{name: float(f"{value:.6g}") for name, value in figures.items() if math.isfinite(value)},
            )
            self._print(progress, speed, seconds, last=step == self._recipe.total_steps)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._logbook:
            self._logbook.close()

    def event(self, name: str, **fields: Any) -> None:
        if self._logbook:
            self._logbook.event(name, **fields)

    def data(self, sources: list[dict[str, Any]]) -> None:
        """What is trained on."""
        if sources:
            self.event("data", sources=sources)
        for row in sources if len(sources) > 1 else ():
            name = f"{row['path']} ({row['language']})" if row["language"] else row["path"]
            log.info("%s: %.4f of the blocks, %.2f epochs in all", name, row["share"], row["epochs"])

    def rolled_back(
        self, cause: RollBack, *, to: int, path: str, window: tuple[int, int], history: History
    ) -> None:
        """`to`: optimiser steps done now; `window`: batches [first, end) that are left out from now on."""
        self.rollbacks = history.rollbacks
        self.pulse.beat("step", step=to)
        self.event(
            "rolled-back", step=to, spikeStep=cause.step, lostSteps=cause.step - to, path=path or None,
            reason=str(cause), leftOut=list(window), learningRateFactor=history.learning_rate_factor,
            rollbacks=history.rollbacks,
        )  # fmt: skip
        if self._metrics:
            self._metrics.rolled_back()
        if self._logbook:
            log.warning(
                "rolled back to step %d (%s); batches %d to %d are left out, learning rate × %.4g from now on; "
                "rollback %d of at most %d", to, path or "initial values", window[0], window[1] - 1,
                history.learning_rate_factor, history.rollbacks, self._recipe.stability.budget,
            )  # fmt: skip

    def ended(self, step: int, peak_memory: int) -> None:
        """`peak_memory`: bytes on this rank's device."""
        seconds = {label: round(spent, 3) for label, spent in self.meter.seconds.items()}
        self.event("ended", step=step, seconds=seconds, peakMemoryBytes=peak_memory)
        spent = sorted(seconds.items(), key=lambda item: -item[1])
        log.info("time went into %s", ", ".join(f"{state} {value:.1f} s" for state, value in spent if value))

    def checkpoint_blocked(self, seconds: float) -> None:
        if self._metrics:
            self._metrics.checkpoint(blocked=seconds)

    def committed(self, ref: CheckpointRef, timing: dict[str, float]) -> None:
        self.ledger.committed(ref.step)
        self.pulse.beat(checkpoint=ref)
        self.event("checkpoint", step=ref.step, path=ref.path, **{k: round(v, 4) for k, v in timing.items()})
        if self._metrics:
            self._metrics.committed(ref.step)
            self._metrics.checkpoint(total=timing.get("total"))
        if self._logbook:
            self._logbook.flush()
            log.info("checkpoint of step %d committed: %s", ref.step, ref.path)

    def _print(self, progress: Progress, figures: Figures, seconds: float, *, last: bool) -> None:
        now = time.monotonic()
        if now - self._printed < CONSOLE_SECONDS and not last:
            return
        self._printed = now
        rate = figures.tokens_per_second
        mfu = f"{figures.mfu:.1%}" if figures.mfu is not None else "unknown"
        speed = f"{rate:,.0f} tok/s, {figures.model_tflops:.4g} TFLOP/s, MFU {mfu}" if rate else f"{seconds:.2f} s"
        log.info(
            "step %d/%d: loss %s, gradient norm %s, lr %.3g, %s",
            progress.step, progress.total_steps, _text(progress.loss), _text(progress.grad_norm),
            progress.learning_rate, speed,
        )


def finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _known(figures: Figures) -> dict[str, float]:
    named = {
        "tokensPerSecond": figures.tokens_per_second, "tflops": figures.model_tflops, "mfu": figures.mfu,
        "mfuPalm": figures.mfu_palm, "hfu": figures.hfu,
    }
    return {name: float(f"{value:.6g}") for name, value in named.items() if value is not None}


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
