"""Spans of reconcile and of recoveries, read back from the SDK's own in-memory exporter; and that off is off."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from operator_cases import Scene, failure
from trireme_api.job import LastFailure, RecoveryPhases
from trireme_api.protocol import AgentState, Cause, PhaseTime, RankReport
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.reconcile import reconcile
from trireme_operator.decide.views import Job
from trireme_operator.options import BadOptions, parse
from trireme_operator.tracing import Off, Spans, build, finished, lengths

ARGUMENTS = ["--coordinator-url", "https://here"]
RECIPE = {
    "recipe": {
        "model": {"preset": "opt-125m"}, "data": {"sources": [{"path": "pvc://c/d"}]}, "until": {"steps": 9},
        "batch": {"tokens": 8192},
    },
    "checkpoint": {"uri": "pvc://c/k"},
    "template": {"resources": {"requests": {"cpu": 1}}},
}  # fmt: skip


@pytest.fixture
def exported() -> Any:
    pytest.importorskip("opentelemetry.sdk", reason="needs pip install 'trireme[tracing]', which the extra dev has")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider), exporter


def recovered(**spec: Any) -> tuple[Job, Job, list[Any]]:
    """A rank fails and comes back. The job before and after its last status, and all jobs in between."""
    scene = Scene(**(spec or RECIPE)).run()
    began = len(scene.notes)
    scene.hear_all(AgentState.RUNNING, ranks=[RankReport(0)], failure=failure(Cause.INFRASTRUCTURE, rank=0))
    jobs = [scene.job]

    def settle() -> None:
        for _ in range(20):
            decision = scene.decide()
            jobs.append(scene.job)
            if decision.status is None and (decision.requeue_after or 99) > 1.0:
                return
            scene.now += 1.0

    settle()
    assert len(scene.notes) > began, "nothing was decided"
    scene.create_all()
    settle()
    told = PhaseTime(assigned=10.0, stopped=10.5, started=11.0, rendezvous=12.0, loaded=14.0, first_step=17.0)
    scene.hear_all(AgentState.RUNNING, ranks=[RankReport(0)], phases=told)
    settle()
    return jobs[0], jobs[-1], jobs


def job_with(phases: RecoveryPhases | None, at: str = "2026-11-29T03:00:00.000Z", **spec: Any) -> Job:
    scene = Scene(**(spec or RECIPE))
    scene.settle()
    status = scene.status.model_copy(deep=True)
    if phases is not None:
        status.last_failure = LastFailure(
            cause=Cause.OOM, message="out of memory", at=at, attempt=1, rank=3, node="n1", phases=phases
        )
    from trireme_operator.controller import plain_status
    from trireme_operator.decide.views import job_of

    return job_of({**scene.obj, "status": plain_status(status)})


WHOLE = RecoveryPhases(detect=0.5, decide=0.25, fence=1.0, replace=4.0, rendezvous=2.0, load=3.0, first_step=5.0)


def test_a_recovery_is_one_span_with_its_phases_end_to_end(exported: Any) -> None:
    spans, exporter = exported
    spans.status_written(job_with(RecoveryPhases(detect=0.5, replace=4.0)), job_with(WHOLE))
    found = {span.name: span for span in exporter.get_finished_spans()}
    assert list(found) == ["detect", "decide", "fence", "replace", "rendezvous", "load", "firstStep", "recovery"]
    whole = found.pop("recovery")
    begin = seconds("2026-11-29T03:00:00.000Z")
    assert begin is not None
    assert whole.start_time == int((begin - 0.5) * 1e9)
    cursor = whole.start_time
    for name, length in zip(found, (0.5, 0.25, 1.0, 3.0, 2.0, 3.0, 5.0), strict=True):
        span = found[name]
        assert span.parent.span_id == whole.context.span_id
        assert span.start_time == pytest.approx(cursor, abs=1000)
        assert span.end_time - span.start_time == pytest.approx(length * 1e9, abs=1000), name
        cursor = span.end_time
    assert whole.end_time == cursor
    assert whole.attributes["trireme.cause"] == "oom"
    assert whole.attributes["trireme.rank"] == 3
    assert whole.attributes["trireme.failed_attempt"] == 1
    assert whole.attributes["trireme.job"] == "job"


def test_of_a_real_sequence_of_decisions_it_is_told_once(exported: Any) -> None:
    spans, exporter = exported
    _, after, jobs = recovered()
    for before, now in pairwise(jobs):
        spans.status_written(before, now)
    spans.status_written(after, after)
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count("recovery") == 1
    assert {"decide", "fence", "replace", "rendezvous", "load", "firstStep"} < set(names)


def test_each_decision_is_a_span_that_says_what_it_comes_to(exported: Any) -> None:
    spans, exporter = exported
    scene = Scene()
    with spans.reconcile(scene.job) as tell:
        decision = reconcile(scene.job, scene.seen(), scene.now)
        tell(decision)
    (span,) = exporter.get_finished_spans()
    assert span.name == "reconcile"
    assert span.attributes["k8s.namespace.name"] == "ns"
    assert span.attributes["trireme.decision.writes"] is True
    assert decision.status is not None
    assert span.attributes["trireme.decision.phase"] == decision.status.phase
    assert list(span.attributes["trireme.decision.notes"]) == [note.reason for note in decision.notes]


def test_a_decision_that_fails_is_an_error_span(exported: Any) -> None:
    spans, exporter = exported
    with pytest.raises(ZeroDivisionError), spans.reconcile(Scene().job):
        raise ZeroDivisionError
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, None, False),
        (None, RecoveryPhases(detect=0.1, decide=0.2), False),
        (RecoveryPhases(detect=0.1), RecoveryPhases(detect=0.1, replace=2.0), False),
        (RecoveryPhases(detect=0.1, replace=2.0), WHOLE, True),
        (WHOLE, WHOLE, False),
        (None, WHOLE, True),
    ],
)
def test_it_ends_with_the_first_new_step(before: Any, after: Any, told: bool) -> None:
    assert (finished(job_with(before).status, job_with(after)) is not None) == told


def test_a_later_failure_is_another_recovery() -> None:
    later = job_with(WHOLE, at=stamp(1_800_000_000))
    assert finished(job_with(WHOLE).status, later) is not None


def test_an_own_script_tells_no_steps_and_ends_when_all_ranks_run() -> None:
    script = {"template": {"image": "i", "command": ["c"]}}
    told = RecoveryPhases(detect=1.0), RecoveryPhases(detect=1.0, replace=2.0)
    before, after = (job_with(phases, **script) for phases in told)
    assert finished(before.status, after) is not None


def test_what_is_not_known_has_no_length() -> None:
    last = LastFailure(cause=Cause.OOM, message="", at="", attempt=1, phases=RecoveryPhases(replace=2.0))
    assert [name for name, length in lengths(last) if length is not None] == ["replace"]


def test_off_imports_nothing_of_opentelemetry_and_records_nothing() -> None:
    code = (
        "import sys, trireme_operator.controller, trireme_operator.tracing as t; one = t.build('off', 'me'); "
        "assert isinstance(one, t.Off); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with Off().reconcile(Scene().job) as tell:
        tell(reconcile(Scene().job, Scene().seen(), 0.0))


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry", "opentelemetry.exporter", "opentelemetry.exporter.otlp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadOptions, match=r"--tracing: needs the Python package .*trireme\[tracing\]"):
        build("otlp", "me")


def test_the_option_is_off_unless_asked_for() -> None:
    assert parse(ARGUMENTS, {}).tracing == "off"
    assert parse(ARGUMENTS, {"TRIREME_TRACING": "otlp"}).tracing == "otlp"
    with pytest.raises(BadOptions, match="--tracing: must be one of off, otlp"):
        parse([*ARGUMENTS, "--tracing", "jaeger"], {})
