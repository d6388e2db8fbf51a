"""What Prometheus is told of training: served by global rank 0 alone, so that no job is counted once per pod. Names and
help stand in the catalogue (`trireme_api.metrics`); whose job it is, the scraper knows."""

from __future__ import annotations

import logging

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from trireme_api.metrics import METRICS
from trireme_api.protocol import Progress

from trireme_trainer.metering import Figures, Meter

log = logging.getLogger(__name__)
disable_created_metrics()  # type: ignore[no-untyped-call]


class TrainMetrics:
    """The `trireme_train_*` series (design §9). A value that is not known has no series."""

    def __init__(self, *, attempt: int) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._counted: dict[str, float] = {}
        self._tokens = self._counter("tokens_total")
        self._waited = self._counter("data_wait_seconds_total")
        self._skipped = self._counter("skipped_steps_total")
        self._spikes = self._counter("spikes_total")
        self._rollbacks = self._counter("rollbacks_total")
        self._spent = self._counter("seconds_total")
        self._step_seconds = self._histogram("step_seconds")
        self._checkpoint_seconds = self._histogram("checkpoint_seconds")
        self._set("attempt", attempt)

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
        self._set("step", progress.step)
        self._set("steps_planned", progress.total_steps)
        self._set("loss", progress.loss)
        self._set("grad_norm", progress.grad_norm)
        self._set("learning_rate", progress.learning_rate)
        self._set("tokens_per_second", figures.tokens_per_second)
        self._set("model_tflops", figures.model_tflops)
        self._set("mfu", figures.mfu)
        self._set("mfu_palm", figures.mfu_palm)
        self._set("hfu", figures.hfu)
        self._tokens.inc(tokens)
        self._skipped.inc(skipped)
        self._step_seconds.observe(seconds)
        spent = meter.seconds
        self._raise_to(self._waited, spent["data-wait"], "data-wait-total")
        for state, total in spent.items():
            self._raise_to(self._spent.labels(state), total, state)

    def stability(self, progress: Progress, *, spike: bool) -> None:
        self._spikes.inc(spike)
        self._set("loss_scale", progress.loss_scale)

    def rolled_back(self) -> None:
        self._rollbacks.inc()

    def checkpoint(self, *, blocked: float | None = None, total: float | None = None) -> None:
        for part, seconds in (("blocked", blocked), ("total", total)):
            if seconds is not None:
                self._checkpoint_seconds.labels(part).observe(seconds)

    def committed(self, step: int) -> None:
        self._set("checkpoint_step", step)

    def _counter(self, name: str) -> Counter:
        metric = METRICS[f"trireme_train_{name}"]
        return Counter(metric.base, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, name: str) -> Histogram:
        metric = METRICS[f"trireme_train_{name}"]
        return Histogram(metric.base, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)

    def _set(self, name: str, value: float | None) -> None:
        """A gauge is there from its first value on, and goes when there is none."""
        gauge = self._gauges.get(name)
        if value is None:
            if gauge is not None:
                self.registry.unregister(self._gauges.pop(name))
            return
        if gauge is None:
            metric = METRICS[f"trireme_train_{name}"]
            gauge = self._gauges[name] = Gauge(metric.base, metric.help, registry=self.registry)
        gauge.set(value)

    def _raise_to(self, counter: Counter, total: float, key: str) -> None:
        before = self._counted.get(key, 0.0)
        if total > before:
            counter.inc(total - before)
            self._counted[key] = total
