"""Trainer, agent and operator expose exactly what the catalogue says: names, types, help, labels."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from operator_cases import Scene, failure, heard
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from trireme_agent.metrics import relayed, render
from trireme_api.metrics import AGENT, METRICS, OPERATOR, TRAINER, exposed_by
from trireme_api.protocol import (
    AgentState,
    Cause,
    CheckpointRef,
    EnergyReading,
    Hardware,
    PhaseTime,
    Progress,
    RankReport,
    Report,
    Spent,
)
from trireme_operator.observe.store import Store
from trireme_operator.serve.metrics import JobCollector, Metrics
from trireme_trainer.telemetry.ledger import Ledger
from trireme_trainer.telemetry.metering import Arithmetic, Figures, Meter
from trireme_trainer.telemetry.metrics import TrainMetrics

FULL = Progress(
    7, total_steps=9, tokens=4, loss=2.5, tokens_per_second=3.0, tflops=1.0, mfu=0.4, grad_norm=1.0, learning_rate=0.1,
    loss_scale=4.0,
)  # fmt: skip


def check(families: Iterable[Family], part: str, missing: Iterable[str] = ()) -> None:
    known = {metric.name: metric for metric in exposed_by(part)}
    seen = {}
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        if not name.startswith("trireme_"):
            continue
        metric = known.get(name)
        assert metric is not None, f"{name} is not in the catalogue"
        kind = "untyped" if family.type == "unknown" else family.type
        assert (kind, family.documentation) == (metric.kind, metric.help), name
        for sample in family.samples:
            labels = tuple(label for label in sample.labels if label != "le")
            assert set(labels) == set(metric.labels), name
        if family.samples:
            seen[name] = family
    assert known.keys() - seen.keys() == set(missing)


def in_trouble() -> Scene:
    """A job that has been through all that a series can tell of."""
    scene = Scene(
        carbonPolicy={"zone": "SE", "budgetGrams": 1e9},
        checkpoint={"uri": "pvc://checkpoints/job"},
        hangPolicy={"stepTimeout": 60},
    ).run()
    told = {
        "progress": FULL, "checkpoint": CheckpointRef(6, "p"), "ranks": [RankReport(0)],
        "energy": {"cpu": EnergyReading(1000.0, "declared")}, "hardware": Hardware(60.0, 8),
        "spent": Spent({"init": 1.0, "step": 4.0}, "step", 0, 7),
    }  # fmt: skip
    scene.hear_all(AgentState.RUNNING, **told)
    scene.settle()
    scene.heard["pod-0-1"] = heard(
        "pod-0-1", 1, AgentState.EXITED, scene.now, failure=failure(Cause.NETWORK, rank=0, exit=1), **told
    )
    scene.settle()
    phases = PhaseTime(scene.now, scene.now, scene.now, scene.now, scene.now, scene.now, scene.now)
    scene.hear_all(AgentState.RUNNING, **told, phases=phases)
    scene.settle()
    assert (scene.status.phase, scene.status.attempt) == ("Running", 2), scene.status.explanation
    return scene


def operator(scene: Scene) -> CollectorRegistry:
    metrics, store = Metrics(), Store()
    metrics.registry.register(JobCollector(store, clock=lambda: scene.now))
    store.put_job(scene.obj)
    metrics.status_written(Scene().run().job, scene.job)
    metrics.api_request("GET", "pods", 200, 0.1)
    metrics.reconciled("done", 0.1)
    metrics.answers.labels("200").inc()
    metrics.event_age.labels("pods").set(1)
    metrics.unannounced.labels("pods").set(0)
    return metrics.registry


def test_the_operator() -> None:
    registry = operator(in_trouble())
    check(registry.collect(), OPERATOR)
    value = registry.get_sample_value
    names = {"namespace": "ns", "job": "job"}
    assert value("trireme_job_failures_total", {**names, "cause": "network"}) == 1
    assert value("trireme_job_failures_total", {**names, "cause": "hang"}) == 0, "counted from 0 on"
    left = {"cause": "network", "action": "RestartProcess"}
    assert value("trireme_job_restart_budget_left", {**names, **left}) == 2
    assert value("trireme_job_restart_budget", {**names, **left}) == 3
    assert (value("trireme_job_last_checkpoint_timestamp_seconds", names) or 0) > 1.7e9
    info = {"uid": "uid", "model": "", "checkpoint": "pvc", "zone": "SE"}
    assert value("trireme_job_info", {**names, **info}) == 1
    grams = value("trireme_job_carbon_grams", {**names, "scope": "operational"})
    assert grams
    assert value("trireme_carbon_grams_total", {"scope": "operational"}) == grams


def test_the_speed_of_a_job_that_stands_still_is_no_series() -> None:
    scene = in_trouble()
    scene.edit(runPolicy={"suspend": True})
    scene.settle()
    assert scene.status.phase == "Suspending"
    value = operator(scene).get_sample_value
    names = {"namespace": "ns", "job": "job"}
    assert value("trireme_job_tokens_per_second", names) is None
    assert value("trireme_job_step", names) == 7


def test_a_replica_that_waits_tells_of_no_job() -> None:
    store, registry = Store(), CollectorRegistry()
    registry.register(JobCollector(store, leading=lambda: False))
    store.put_job(Scene().run().obj)
    assert not [sample for family in registry.collect() for sample in family.samples]


def trainer(figures: Figures) -> TrainMetrics:
    metrics = TrainMetrics(attempt=1)
    metrics.stability(FULL, spike=True)
    meter = Meter(Arithmetic(1.0, 1.0, 1.0, None), 1, Ledger())
    metrics.step(FULL, figures, meter, tokens=4, seconds=0.1, skipped=False)
    metrics.checkpoint(blocked=0.1, total=0.2)
    metrics.committed(6)
    return metrics


def test_the_trainer() -> None:
    metrics = trainer(Figures(3.0, 0.1, 1.0, 0.4, 0.4, 0.5))
    check(metrics.registry.collect(), TRAINER)
    assert b"_created" not in generate_latest(metrics.registry)


def test_an_unknown_device_has_no_utilisation() -> None:
    missing = {"trireme_train_mfu", "trireme_train_mfu_palm", "trireme_train_hfu"}
    check(trainer(Figures(3.0, 0.1, 1.0)).registry.collect(), TRAINER, missing)


def report() -> Report:
    ranks = [RankReport(0, pid=10, step=7, heartbeat_age=0.5), RankReport(1, pid=11, exit=-9)]
    energy = {part: EnergyReading(1.5, "rapl") for part in ("cpu", "dram")} | {"gpu": EnergyReading(None, "missing")}
    return Report("uid", 3, AgentState.RUNNING, ranks=ranks, energy=energy)


def test_the_agent() -> None:
    check(text_string_to_metric_families(render(report(), 1.5, 2)), AGENT)


@contextmanager
def page(text: str) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_the_agent_hands_on_what_the_trainer_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    told = generate_latest(trainer(Figures(3.0, 0.1, 1.0, 0.4, 0.4, 0.5)).registry).decode()
    with page(told) as port:
        both = list(text_string_to_metric_families(render(report(), 1.5, 2) + relayed(port)))
    for part in (TRAINER, AGENT):
        check((f for f in both if f.name.startswith("trireme_train_") == (part == TRAINER)), part)


def test_the_agent_hands_on_nothing_else() -> None:
    """Whoever trains must not be able to speak for the operator, nor to break the page of its own pod."""
    text = "# TYPE trireme_leader gauge\ntrireme_leader 1\ngarbage\ntrireme_train_step 5\ncut off in the mid"
    with page(text) as port:
        assert relayed(port) == "trireme_train_step 5\n"
    assert relayed(port) == "", "nobody listens any more"


def test_names_are_by_the_book() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name
        assert (metric.kind in ("counter", "untyped")) == name.endswith("_total")
        assert metric.help.endswith(".")
        assert not {"le", "instance", "pod"} & set(metric.labels), "the scraper's"
        assert bool(metric.buckets) == (metric.kind == "histogram")
