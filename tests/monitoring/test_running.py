"""A real Prometheus scrapes a job that trains and loses a rank: what it finds is the catalogue, and all queries have
data."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from localcluster.prometheus import program
from queries import (
    Query,
    check_catalogue,
    check_panel,
    check_rule,
    of_panels,
    of_rules,
)
from rig import eventually
from world import JOB, NAMESPACE, OPERATOR, Running, running


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("monitoring")) as found:
        eventually(lambda: found.world.status(JOB).get("lastCheckpoint"), "a checkpoint", 60)
        eventually(lambda: found.step() > 60, "steps", 60)
        found.kill_rank(f"{JOB}-1-1")
        eventually(lambda: found.world.status(JOB).get("attempt") == 2, "a second attempt")
        eventually(lambda: "firstStep" in found.world.status(JOB)["lastFailure"]["phases"], "recovery", 60)
        time.sleep(10)
        yield found


def test_every_target_is_up(there: Running) -> None:
    up = {series["metric"]["pod"]: series["value"][1] for series in there.prometheus.get("query", query="up")["result"]}
    assert up == {OPERATOR: "1", f"{JOB}-0-1": "1", f"{JOB}-1-1": "1"}


def test_what_is_exposed_is_what_the_catalogue_says(there: Running) -> None:
    check_catalogue(there.prometheus)


def test_series_join_whoever_tells_them(there: Running) -> None:
    query = "{} * on (namespace, job) group_left (model) trireme_job_info"
    for name in ("trireme_train_loss", "trireme_agent_rank_up", "trireme_job_loss"):
        found = there.prometheus.get("query", query=query.format(name))["result"]
        assert found, name
        for series in found:
            metric = series["metric"]
            assert (metric["namespace"], metric["job"], metric["model"]) == (NAMESPACE, JOB, "opt-tiny")
            assert not [label for label in metric if label.startswith("exported_")]


@pytest.mark.parametrize("query", of_panels(), ids=lambda query: query.where)
def test_every_panel_shows_something(there: Running, query: Query) -> None:
    check_panel(there.prometheus, query, NAMESPACE, JOB, there.began)


@pytest.mark.parametrize("query", of_rules(), ids=lambda query: query.where)
def test_every_rule_reads_series_that_are_there(there: Running, query: Query) -> None:
    check_rule(there.prometheus, query, there.began)


def test_what_is_served_pleases_promtool(there: Running) -> None:
    ports = {"operator": there.operator.ports[1], **{uid: agent for uid, (agent, _) in there.kubelet.ports.items()}}
    for name, port in ports.items():
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read()
        done = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, b""), name


def test_few_series_for_each_job(there: Running) -> None:
    """Bounded: no label's values grow with time. What docs/monitoring.md says of their number."""
    counts = {
        part: len(there.prometheus.get("query", query=f'{{__name__=~"{names}",job="{JOB}"}}')["result"])
        for part, names in (
            ("operator", "trireme_job_.+"), ("agents", "trireme_(agent|cpu|dram)_.+"), ("trainer", "trireme_train_.+"),
        )
    }  # fmt: skip
    print(counts)
    assert counts["operator"] <= 80
    assert counts["agents"] <= 2 * 20
    assert counts["trainer"] <= 90


def test_series_go_with_the_job(there: Running) -> None:
    there.world.delete(JOB)
    query = f'{{__name__=~"trireme_.+",job="{JOB}"}}'
    for pod in there.world.pods(JOB):
        there.world.found("DELETE", there.kubelet.path(pod), {"gracePeriodSeconds": 0})
    eventually(lambda: not there.prometheus.get("query", query=query)["result"], "its series end", 60, pause=1.0)
