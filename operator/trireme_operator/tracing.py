"""OpenTelemetry spans of reconcile and of recoveries, through the standard SDK. Off by default, and then nothing is
imported or recorded.

A recovery is told after the fact, from the seconds that stand in status (`lastFailure.phases`): one span from the
failure to the first new step, its phases as children one after the other. Phases are measured by several clocks, each
within one; laid end to end they show how long each took, not to the millisecond when.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from trireme_api.job import LastFailure, TrainingJobStatus

from trireme_operator.decide.actions import Decision
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.views import Job
from trireme_operator.options import BadOptions

SERVICE = "trireme-operator"
PHASES = ("detect", "decide", "fence", "replace", "rendezvous", "load", "firstStep")
_NANO = 1_000_000_000


class Tracing(Protocol):
    def reconcile(self, job: Job) -> Any:
        """Context of one decision; call what it gives with the decision."""

    def status_written(self, before: Job, after: Job) -> None:
        """Tells a recovery when the last of its times stands in status."""

    def close(self) -> None:
        """Sends what is left."""


class Off:
    """Costs an attribute look-up and a call."""

    @contextmanager
    def reconcile(self, job: Job) -> Iterator[Any]:
        yield _ignore

    def status_written(self, before: Job, after: Job) -> None:
        pass

    def close(self) -> None:
        pass


def _ignore(decision: Decision) -> None:
    pass


class Spans:
    """`provider`: an SDK TracerProvider."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace

        self._provider = provider
        self._trace = trace
        self._tracer = provider.get_tracer(SERVICE)

    @contextmanager
    def reconcile(self, job: Job) -> Iterator[Any]:
        with self._tracer.start_as_current_span("reconcile", attributes=_of(job)) as span:
            yield lambda decision: span.set_attributes(_decided(decision))

    def status_written(self, before: Job, after: Job) -> None:
        failure = finished(before.status, after)
        if failure is not None:
            self._recovery(after, failure)

    def close(self) -> None:
        self._provider.shutdown()

    def _recovery(self, job: Job, failure: LastFailure) -> None:
        known = [(name, length) for name, length in lengths(failure) if length is not None]
        at = seconds(failure.at)
        assert at is not None
        begin = at - (failure.phases.detect or 0.0)
        end = begin + sum(length for _, length in known)
        attributes = {
            **_of(job), "trireme.cause": failure.cause.value, "trireme.failed_attempt": failure.attempt,
            "trireme.message": failure.message,
        }  # fmt: skip
        for name, value in (("rank", failure.rank), ("node", failure.node), ("rule", failure.rule)):
            if value is not None:
                attributes[f"trireme.{name}"] = value
        span = self._tracer.start_span("recovery", start_time=_nanos(begin), attributes=attributes)
        within, cursor = self._trace.set_span_in_context(span), begin
        for name, length in known:
            child = self._tracer.start_span(name, context=within, start_time=_nanos(cursor))
            cursor += length
            child.end(_nanos(cursor))
        span.end(_nanos(end))


def lengths(failure: LastFailure) -> list[tuple[str, float | None]]:
    """Seconds of each phase in their order. `replace` as it stands in status begins with the new attempt and so holds
    `fence`; here each second is in one phase."""
    phases = failure.phases
    replace = phases.replace
    if replace is not None and phases.fence is not None:
        replace = max(0.0, replace - phases.fence)
    values = (
        phases.detect, phases.decide, phases.fence, replace, phases.rendezvous, phases.load, phases.first_step,
    )  # fmt: skip
    return list(zip(PHASES, values, strict=True))


def finished(before: TrainingJobStatus, after: Job) -> LastFailure | None:
    """The failure whose recovery ends with this status: at the first new step; of an own script, which tells no steps,
    when all ranks run."""
    old, new = before.last_failure, after.status.last_failure
    if new is None:
        return None
    known = old.phases if old is not None and old.at == new.at else None
    steps = after.spec is None or after.spec.recipe is not None
    name = "first_step" if steps else "replace"
    is_there, was_there = getattr(new.phases, name), getattr(known, name) if known else None
    return new if is_there is not None and was_there is None else None


def _of(job: Job) -> dict[str, Any]:
    return {
        "k8s.namespace.name": job.namespace,
        "trireme.job": job.name,
        "trireme.attempt": job.status.attempt,
        "trireme.phase": str(job.status.phase or ""),
    }


def _decided(decision: Decision) -> dict[str, Any]:
    """What a decision comes to: the phase it writes, what it does and says."""
    found: dict[str, Any] = {
        "trireme.decision.writes": decision.status is not None,
        "trireme.decision.actions": [type(action).__name__ for action in decision.actions],
        "trireme.decision.notes": [note.reason for note in decision.notes],
    }
    if decision.status is not None:
        found["trireme.decision.phase"] = str(decision.status.phase or "")
        found["trireme.decision.attempt"] = decision.status.attempt
        found["trireme.decision.explanation"] = decision.status.explanation
    return found


def _nanos(at: float) -> int:
    return int(at * _NANO)


def build(exporter: str, identity: str) -> Tracing:
    """`off`, or `otlp`: OTLP over HTTP, set up by the SDK's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, …_HEADERS,
    OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES). Raises BadOptions where the SDK is not installed."""
    if exporter == "off":
        return Off()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        needed = f"--tracing: needs the Python package {error.name!r}; pip install 'trireme[tracing]'"
        raise BadOptions(needed) from None
    resource = Resource.create({"service.name": SERVICE, "service.instance.id": identity})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)
