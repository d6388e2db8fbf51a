"""What Prometheus is told of training: served by global rank 0 alone, so that no job is counted once per pod. Names and
help stand in the catalogue (`trireme_api.metrics`); whose job it is, the scraper knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from trireme_api.metrics import METRICS
from trireme_api.protocol import Progress

from trireme_trainer.telemetry.metering import Figures, Meter

log = logging.getLogger(__name__)
disable_created_metrics()  # type: ignore[no-untyped-call]


class Gauges(Collector):
    """Made at a scrape of what a step only writes down. A value that is not known has no series."""

    def __init__(self) -> None:
        self.values: dict[str, float | None] = {}

    def collect(self) -> Iterator[Metric]:
        for name, value in dict(self.values).items():
            if value is not None:
                metric = METRICS[f"trireme_train_{name}"]
                yield GaugeMetricFamily(metric.base, metric.help, value)


class TrainMetrics:
    """The `trireme_train_*` series (design §9)."""

    def __init__(self, *, attempt: int) -> None:
        self.registry = CollectorRegistry()
        self._gauges = Gauges()
        self.registry.register(self._gauges)
        self._counted: dict[str, float] = {}
        """Seconds by state, as far as the counters have them."""
        self._tokens = self._counter("tokens_total")
        self._waited = self._counter("data_wait_seconds_total")
        self._skipped = self._counter("skipped_steps_total")
        self._spikes = self._counter("spikes_total")
        self._rollbacks = self._counter("rollbacks_total")
        self._spent = self._counter("seconds_total")
        self._step_seconds = self._histogram("step_seconds")
        self._checkpoint_seconds = self._histogram("checkpoint_seconds")
        self._gauges.values["attempt"] = attempt

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
        self._gauges.values |= {
            "step": progress.step, "steps_planned": progress.total_steps, "loss": progress.loss,
            "grad_norm": progress.grad_norm, "learning_rate": progress.learning_rate,
            "tokens_per_second": figures.tokens_per_second, "model_tflops": figures.model_tflops, "mfu": figures.mfu,
            "mfu_palm": figures.mfu_palm, "hfu": figures.hfu,
        }  # fmt: skip
        self._tokens.inc(tokens)
        self._skipped.inc(skipped)
        self._step_seconds.observe(seconds)
        self._spend(meter.seconds)

    def _spend(self, seconds: dict[str, float]) -> None:
        """Wall time by state, in all; each state has a series from the first step on."""
        if not self._counted:
            self._counted = dict.fromkeys(seconds, 0.0)
            for state in seconds:
                self._spent.labels(state)
        for state, total in seconds.items():
            more = total - self._counted[state]
            if more <= 0:
                continue
            self._counted[state] = total
            self._spent.labels(state).inc(more)
            if state == "data-wait":
                self._waited.inc(more)

    def stability(self, progress: Progress, *, spike: bool) -> None:
        self._spikes.inc(spike)
        self._gauges.values["loss_scale"] = progress.loss_scale

    def rolled_back(self) -> None:
        self._rollbacks.inc()

    def checkpoint(self, *, blocked: float | None = None, total: float | None = None) -> None:
        for part, seconds in (("blocked", blocked), ("total", total)):
            if seconds is not None:
                self._checkpoint_seconds.labels(part).observe(seconds)

    def committed(self, step: int) -> None:
        self._gauges.values["checkpoint_step"] = step

    def _counter(self, name: str) -> Counter:
        metric = METRICS[f"trireme_train_{name}"]
        return Counter(metric.base, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, name: str) -> Histogram:
        metric = METRICS[f"trireme_train_{name}"]
        return Histogram(metric.base, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)
