"""Prometheus metrics. What is said of a job is read from its status at scrape time: its series go when the job goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from trireme_api.job import Phase, TrainingJobStatus
from trireme_api.ledger import LEDGER_STATES

from trireme_operator.bookkeeping import up_to
from trireme_operator.frozen import effective
from trireme_operator.store import Store
from trireme_operator.views import Job

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter that nobody asks for
JOB = ("namespace", "job")
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RECOVERY = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass
class Metrics:
    """The operator's own figures, in a registry of their own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        registry = self.registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.reconciles = Counter("trireme_reconcile", "Looks at a job by result.", ["result"], registry=registry)
        self.reconcile_seconds = Histogram(
            "trireme_reconcile_seconds", "One look at a job, writes included.", registry=registry, buckets=FAST
        )
        self.requests = Counter(
            "trireme_api_requests", "Requests to the Kubernetes API.", ["verb", "resource", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "trireme_api_request_seconds", "Time of such a request.", ["verb"], registry=registry, buckets=FAST
        )
        self.queue_depth = Gauge("trireme_queue_depth", "Jobs marked to be looked at.", registry=registry)
        self.queue_age = Gauge("trireme_queue_oldest_seconds", "How late the latest of them is.", registry=registry)
        self.leader = Gauge("trireme_leader", "1 on the replica that leads.", registry=registry)
        self.event_age = Gauge(
            "trireme_watch_last_event_age_seconds", "Since the last event of a watch.", ["resource"], registry=registry
        )
        self.reports = Gauge(
            "trireme_coordinator_answers", "Answers to agents by HTTP status.", ["code"], registry=registry
        )
        self.polling = Gauge("trireme_coordinator_waiting_agents", "Agents in a long poll.", registry=registry)
        self.recovery_seconds = Histogram(
            "trireme_recovery_seconds", "Parts of each recovery.", ["phase"], registry=registry, buckets=RECOVERY
        )

    def api_request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        self.requests.labels(verb, resource, str(code)).inc()
        self.request_seconds.labels(verb).observe(seconds)

    def reconciled(self, result: str, seconds: float) -> None:
        self.reconciles.labels(result).inc()
        self.reconcile_seconds.observe(seconds)

    def status_written(self, before: Job, after: Job) -> None:
        """Each part of a recovery is observed once: when it first stands in status."""
        old, new = before.status.last_failure, after.status.last_failure
        if new is None:
            return
        known = old.phases if old is not None and old.at == new.at else None
        for name in type(new.phases).model_fields:
            value = getattr(new.phases, name)
            if value is not None and (known is None or getattr(known, name) is None):
                self.recovery_seconds.labels(name).observe(value)


class JobCollector(Collector):
    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"trireme_job_{name}", text, labels=JOB) for name, (text, _) in _FIGURES.items()
        }
        phase = GaugeMetricFamily("trireme_job_phase", "1 for the phase the job is in.", labels=[*JOB, "phase"])
        info = GaugeMetricFamily(
            "trireme_job_info", "What the job is; join on namespace and job.", labels=[*JOB, "uid", "model", "zone"]
        )
        restarts = CounterMetricFamily("trireme_job_restarts", "Restarts by kind.", labels=[*JOB, "kind"])
        causes = CounterMetricFamily("trireme_job_failures", "Failures answered, by cause.", labels=[*JOB, "cause"])
        energy = CounterMetricFamily("trireme_job_energy_joules", "Energy of all attempts.", labels=[*JOB, "source"])
        # A gauge, for time moves from `step` to `lost` when steps turn out to be done again.
        spent = GaugeMetricFamily(
            "trireme_job_seconds_total", "Wall time by the state it went into.", labels=[*JOB, "state"]
        )
        carbon = CounterMetricFamily("trireme_job_carbon_grams", "CO2e of all attempts.", labels=[*JOB, "scope"])
        for job in self._store.jobs.values():
            status, names = job.status, [job.namespace, job.name]
            spec = effective(job)
            model = spec.recipe.model.preset if spec is not None and spec.recipe is not None else ""
            zone = (spec.carbon_policy.zone or "") if spec is not None else ""
            info.add_metric([*names, job.uid, model, zone], 1)
            for one in Phase:
                phase.add_metric([*names, one.value], float(status.phase == one))
            for name, (_, read) in _FIGURES.items():
                value = read(status)
                if value is not None:
                    gauges[name].add_metric(names, float(value))
            for kind in ("process", "pod", "gang"):
                restarts.add_metric([*names, kind], getattr(status.restarts, kind))
            for cause, count in status.restarts.by_cause.items():
                causes.add_metric([*names, cause], count)
            goodput = up_to(status.goodput, self._clock()) if status.goodput is not None else None
            for state in LEDGER_STATES if goodput is not None else ():
                spent.add_metric([*names, state], goodput.seconds.get(state, 0.0) if goodput else 0.0)
            if status.energy.source != "missing":
                energy.add_metric([*names, status.energy.source], status.energy.joules)
            if status.carbon.grams is not None:
                carbon.add_metric([*names, "operational"], status.carbon.grams)
        yield from gauges.values()
        yield from (phase, info, restarts, causes, energy, carbon, spent)


Figure = tuple[str, Callable[[TrainingJobStatus], float | None]]


def _progress(name: str, text: str) -> Figure:
    def read(status: TrainingJobStatus) -> float | None:
        value: float | None = getattr(status.progress, name) if status.progress is not None else None
        return value

    return text, read


_FIGURES: dict[str, Figure] = {
    "step": _progress("step", "Optimiser steps done."),
    "total_steps": _progress("total_steps", "Optimiser steps to do."),
    "tokens": _progress("tokens", "Tokens trained on."),
    "loss": _progress("loss", "Newest training loss."),
    "tokens_per_second": _progress("tokens_per_second", "Throughput of the whole job."),
    "model_tflops": _progress("tflops", "Model TFLOP/s per device."),
    "mfu": _progress("mfu", "Model FLOPs utilisation, 0 to 1."),
    "nodes_desired": ("Nodes asked for.", lambda status: status.replicas.desired),
    "nodes_ready": ("Nodes whose ranks run.", lambda status: status.replicas.ready),
    "attempt": ("Number of the attempt.", lambda status: status.attempt),
    "stragglers": ("Ranks that the others wait for, each step.", lambda status: len(status.stragglers)),
    "goodput_ratio": (
        "Effective training time: step / all time but queued and suspended, 0 to 1.",
        lambda status: status.goodput.ratio if status.goodput is not None else None,
    ),
    "lost_steps": (
        "Optimiser steps that had to be done again.",
        lambda status: status.goodput.lost_steps if status.goodput is not None else None,
    ),
    "last_checkpoint_step": (
        "Newest committed checkpoint.",
        lambda status: status.last_checkpoint.step if status.last_checkpoint is not None else None,
    ),
}
