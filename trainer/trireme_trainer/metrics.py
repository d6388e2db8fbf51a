"""What Prometheus scrapes from training: served by global rank 0 alone, so that no job is counted once per pod."""

from __future__ import annotations

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from trireme_api.protocol import Progress

from trireme_trainer.metering import Figures, Meter

log = logging.getLogger(__name__)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class TrainMetrics:
    """The `trireme_train_*` series (design §9). A value that is not known has no series."""

    def __init__(self, *, job: str, namespace: str, attempt: int) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"job": job, "namespace": namespace}
        self._gauges: dict[str, Gauge] = {}
        self._counted: dict[str, float] = {}
        names = tuple(self._labels)
        self._tokens = Counter("trireme_train_tokens", "Tokens trained by this attempt.", names, registry=self.registry)
        self._waited = Counter(
            "trireme_train_data_wait_seconds", "Seconds rank 0 stood waiting for data.", names, registry=self.registry
        )
        self._skipped = Counter(
            "trireme_train_skipped_steps", "Steps that left the weights alone: not finite, or a spike.", names,
            registry=self.registry,
        )
        self._spikes = Counter("trireme_train_spikes", "Loss spikes, whatever was done.", names, registry=self.registry)
        self._rollbacks = Counter(
            "trireme_train_rollbacks", "How often this attempt went back in place.", names, registry=self.registry
        )
        self._spent = Counter(
            "trireme_train_seconds", "Wall time of this attempt by what it went into.", (*names, "state"),
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "trireme_train_step_seconds", "Seconds per steady step.", names, buckets=_SECONDS, registry=self.registry
        )
        self._checkpoint_seconds = Histogram(
            "trireme_train_checkpoint_seconds", "Seconds per checkpoint: blocked (training stood still) or total.",
            (*names, "part"), buckets=_SECONDS, registry=self.registry,
        )
        self._set("trireme_train_attempt", "Attempt this process belongs to.", attempt)

    def serve(self, port: int) -> None:
        """In a daemon thread. A port that is taken costs the metrics, not the training."""
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            log.warning("no metrics: port %d: %s", port, error.strerror)

    def step(
        self, progress: Progress, figures: Figures, meter: Meter, *, tokens: float, seconds: float, skipped: bool
    ) -> None:
        """`seconds`: of the newest step; `tokens`: valid tokens in it."""
        self._set("trireme_train_step", "Optimiser steps done.", progress.step)
        self._set("trireme_train_steps_planned", "Optimiser steps of the whole run.", progress.total_steps)
        self._set("trireme_train_loss", "Mean cross-entropy per valid token, nats.", progress.loss)
        self._set("trireme_train_grad_norm", "Global L2 gradient norm before clipping.", progress.grad_norm)
        self._set("trireme_train_learning_rate", "Learning rate of the newest step.", progress.learning_rate)
        self._set("trireme_train_tokens_per_second", "Steady state, all devices.", figures.tokens_per_second)
        self._set("trireme_train_model_tflops", "Model TFLOP/s per device, causal-exact.", figures.model_tflops)
        self._set("trireme_train_mfu", "Model FLOPs utilisation, 0..1.", figures.mfu)
        self._set("trireme_train_mfu_palm", "The same by PaLM's formula.", figures.mfu_palm)
        self._set("trireme_train_hfu", "Utilisation with recomputed FLOPs, 0..1.", figures.hfu)
        self._tokens.labels(**self._labels).inc(tokens)
        self._skipped.labels(**self._labels).inc(skipped)
        self._step_seconds.labels(**self._labels).observe(seconds)
        spent = meter.seconds
        self._raise_to(self._waited, spent["data-wait"], "data-wait-total")
        for state, total in spent.items():
            self._raise_to(self._spent, total, state, state=state)

    def stability(self, progress: Progress, *, spike: bool) -> None:
        self._spikes.labels(**self._labels).inc(spike)
        self._rollbacks.labels(**self._labels).inc(0)
        self._set("trireme_train_loss_scale", "What fp16 gradients are scaled by.", progress.loss_scale)

    def rolled_back(self) -> None:
        self._rollbacks.labels(**self._labels).inc()

    def checkpoint(self, *, blocked: float | None = None, total: float | None = None) -> None:
        for part, seconds in (("blocked", blocked), ("total", total)):
            if seconds is not None:
                self._checkpoint_seconds.labels(**self._labels, part=part).observe(seconds)

    def committed(self, step: int) -> None:
        self._set("trireme_train_checkpoint_step", "Step of the newest committed checkpoint.", step)

    def _set(self, name: str, text: str, value: float | None) -> None:
        if value is None:
            if name in self._gauges:
                self._gauges[name].clear()
            return
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, tuple(self._labels), registry=self.registry)
        self._gauges[name].labels(**self._labels).set(value)

    def _raise_to(self, counter: Counter, total: float, key: str, **labels: str) -> None:
        before = self._counted.get(key, 0.0)
        if total > before:
            counter.labels(**self._labels, **labels).inc(total - before)
            self._counted[key] = total
