"""The operator's own Prometheus metrics; what it tells of jobs is in `job_metrics`. Names and help: the catalogue."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from trireme_api.job import RecoveryPhases
from trireme_api.metrics import METRICS

from trireme_operator.decide.views import Job
from trireme_operator.serve.job_metrics import JobCollector as JobCollector
from trireme_operator.serve.job_metrics import carbon_grams

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter that nobody asks for


@dataclass
class Metrics:
    """In a registry of their own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        registry = self.registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.reconciles = self._counter("trireme_reconcile_total")
        self.reconcile_seconds = self._histogram("trireme_reconcile_seconds")
        self.requests = self._counter("trireme_api_requests_total")
        self.request_seconds = self._histogram("trireme_api_request_seconds")
        self.queue_depth = self._gauge("trireme_queue_depth")
        self.queue_age = self._gauge("trireme_queue_oldest_seconds")
        self.late = self._gauge("trireme_loop_late_seconds")
        self.leader = self._gauge("trireme_leader")
        self.event_age = self._gauge("trireme_watch_last_event_age_seconds")
        self.unannounced = self._gauge("trireme_watch_unannounced_lists")
        self.answers = self._counter("trireme_coordinator_answers_total")
        self.polling = self._gauge("trireme_coordinator_waiting_agents")
        self.recovery_seconds = self._histogram("trireme_recovery_seconds")
        for phase in RecoveryPhases.model_fields:  # from 0 on: `increase` does not see a series' first value
            self.recovery_seconds.labels(phase)
        self.carbon = self._counter("trireme_carbon_grams_total")
        for scope in ("operational", "embodied"):
            self.carbon.labels(scope)

    def _counter(self, name: str) -> Counter:
        metric = METRICS[name]
        return Counter(metric.base, metric.help, metric.labels, registry=self.registry)

    def _gauge(self, name: str) -> Gauge:
        metric = METRICS[name]
        return Gauge(metric.base, metric.help, metric.labels, registry=self.registry)

    def _histogram(self, name: str) -> Histogram:
        metric = METRICS[name]
        return Histogram(metric.base, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)

    def api_request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        self.requests.labels(verb, resource, str(code)).inc()
        self.request_seconds.labels(verb).observe(seconds)

    def reconciled(self, result: str, seconds: float) -> None:
        self.reconciles.labels(result).inc()
        self.reconcile_seconds.observe(seconds)

    def status_written(self, before: Job, after: Job) -> None:
        """Counts what came with this status: grams of CO2e, and each part of a recovery when it first stands there."""
        known_grams = carbon_grams(before.status)
        for scope, grams in carbon_grams(after.status).items():
            self.carbon.labels(scope).inc(max(0.0, grams - known_grams.get(scope, 0.0)))
        old, new = before.status.last_failure, after.status.last_failure
        if new is None:
            return
        known = old.phases if old is not None and old.at == new.at else None
        for name in type(new.phases).model_fields:
            value = getattr(new.phases, name)
            if value is not None and (known is None or getattr(known, name) is None):
                self.recovery_seconds.labels(name).observe(value)
