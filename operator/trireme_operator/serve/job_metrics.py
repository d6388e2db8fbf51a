"""What Prometheus is told of each job, read from its status at scrape time: its series go when the job goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector
from trireme_api.job import TERMINAL, Phase, TrainingJobSpec, TrainingJobStatus
from trireme_api.ledger import LEDGER_STATES
from trireme_api.metrics import COUNTER, GAUGE, JOB, OPERATOR, UNTYPED, exposed_by
from trireme_api.protocol import Cause

from trireme_operator.decide.bookkeeping import up_to
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.frozen import effective
from trireme_operator.decide.views import Job
from trireme_operator.observe.store import Store

_FAMILY = {COUNTER: CounterMetricFamily, GAUGE: GaugeMetricFamily, UNTYPED: UnknownMetricFamily}
Sample = tuple[str, tuple[str, ...], float | None]
"""Name without `trireme_job_`, labels beyond namespace and job, value; None: not known, so no series."""


class JobCollector(Collector):
    """Told by the replica that leads alone, or each sum over jobs would count them once per replica. Collects in any
    thread: the store puts another job in the place of one that changed."""

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, leading: Callable[[], bool] = lambda: True
    ) -> None:
        self._store = store
        self._clock = clock
        self._leading = leading

    def collect(self) -> Iterator[Metric]:
        families = {
            metric.name: _FAMILY[metric.kind](metric.base, metric.help, labels=metric.labels)
            for metric in exposed_by(OPERATOR)
            if metric.labels[:2] == JOB
        }
        for job in list(self._store.jobs.values()) if self._leading() else ():
            for name, labels, value in samples(job, self._clock()):
                if value is not None:
                    families[f"trireme_job_{name}"].add_metric([job.namespace, job.name, *labels], float(value))
        yield from families.values()


def samples(job: Job, now: float) -> Iterator[Sample]:
    status, spec = job.status, effective(job)
    yield "info", (job.uid, *_about(spec)), 1
    for phase in Phase:
        yield "phase", (phase.value,), status.phase == phase
    yield from _progress(status)
    yield "nodes_desired", (), status.replicas.desired
    yield "nodes_ready", (), status.replicas.ready
    yield "nodes_avoided", (), len(status.avoided_nodes)
    yield "attempt", (), status.attempt
    yield "stragglers", (), len(status.stragglers)
    yield "start_timestamp_seconds", (), seconds(status.start_time)
    yield "attempt_start_timestamp_seconds", (), seconds(status.attempt_started_at)
    if status.last_checkpoint is not None:
        yield "last_checkpoint_step", (), status.last_checkpoint.step
        yield "last_checkpoint_timestamp_seconds", (), seconds(status.last_checkpoint.seen_at)
    yield from _failures(status, spec)
    yield from _ledger(status, now)
    yield from _footprint(status)
    yield "carbon_budget_grams", (), spec.carbon_policy.budget_grams if spec is not None else None


def _about(spec: TrainingJobSpec | None) -> tuple[str, str, str]:
    """Model, where checkpoints go (the scheme of their URI), zone of the grid; empty where there is none."""
    if spec is None:
        return "", "", ""
    model = spec.recipe.model.preset if spec.recipe is not None else None
    scheme, found, _ = spec.checkpoint.uri.partition("://") if spec.checkpoint is not None else ("", "", "")
    return model or "", scheme if found else "path" if scheme else "", spec.carbon_policy.zone or ""


def _progress(status: TrainingJobStatus) -> Iterator[Sample]:
    told = status.progress
    if told is None:
        return
    yield "step", (), told.step
    yield "total_steps", (), told.total_steps
    yield "tokens", (), told.tokens
    yield "loss", (), told.loss
    if status.phase == Phase.RUNNING:  # the speed of a job that stands still is none, not its last one
        yield "tokens_per_second", (), told.tokens_per_second
        yield "model_tflops", (), told.tflops
        yield "mfu", (), told.mfu
        yield "end_timestamp_seconds", (), seconds(told.eta)


def _failures(status: TrainingJobStatus, spec: TrainingJobSpec | None) -> Iterator[Sample]:
    for kind in ("process", "pod", "gang"):
        yield "restarts_total", (kind,), getattr(status.restarts, kind)
    for cause in Cause:  # from 0 on: `increase` does not see a counter that begins with its first event
        yield "failures_total", (cause.value,), status.restarts.by_cause.get(cause.value, 0)
    ladder = spec.failure_policy.ladder if spec is not None else ()
    budget: dict[str, int] = {step.action: step.max for step in ladder}
    for used, left in status.budgets_left.items() if status.phase not in TERMINAL else ():
        for action, number in left.items():
            yield "restart_budget", (used, action), budget.get(action)
            yield "restart_budget_left", (used, action), number
    yield "hang", (), status.hang is not None
    if status.last_failure is not None:
        for name in type(status.last_failure.phases).model_fields:
            yield "recovery_seconds", (name,), getattr(status.last_failure.phases, name)


def _ledger(status: TrainingJobStatus, now: float) -> Iterator[Sample]:
    if status.goodput is None:
        return
    yield "goodput_ratio", (), status.goodput.ratio
    yield "lost_steps", (), status.goodput.lost_steps
    passed = up_to(status.goodput, now).seconds
    for state in LEDGER_STATES:
        yield "seconds_total", (state,), passed.get(state, 0.0)


def _footprint(status: TrainingJobStatus) -> Iterator[Sample]:
    if status.energy.source != "missing":
        yield "energy_joules", (status.energy.source,), status.energy.joules
        yield "idle_energy_joules", (), status.energy.idle_joules
    for scope, grams in carbon_grams(status).items():
        yield "carbon_grams", (scope,), grams
    yield "carbon_grams_per_million_tokens", (), status.carbon.grams_per_million_tokens
    yield "grid_grams_per_kilowatt_hour", (), status.carbon.grams_per_kilowatt_hour


def carbon_grams(status: TrainingJobStatus) -> dict[str, float]:
    """By scope; one that is not known is left out."""
    carbon = status.carbon
    found = {"operational": carbon.grams, "embodied": carbon.embodied.mid if carbon.embodied is not None else None}
    return {scope: grams for scope, grams in found.items() if grams is not None}
