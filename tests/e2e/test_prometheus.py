"""A real Prometheus scrapes the operator and the pods of a job that trains and loses a rank, by what
manifests/monitoring says; every query of every panel and rule finds data."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cluster"), str(ROOT / "tests" / "monitoring")]

from e2e_support import EVERY, Jobs, operator_pods  # noqa: E402
from localcluster.prometheus import Prometheus  # noqa: E402
from queries import check_catalogue, check_panel, check_rule, of_panels, of_rules  # noqa: E402
from scraping import config  # noqa: E402
from ways import ThroughExec, discovering, proxy  # noqa: E402

from demo.kube import wait_until  # noqa: E402
from demo.target import OPERATOR, SYSTEM, Target  # noqa: E402
from demo.training import recover, started  # noqa: E402

INTERVAL = "10s"
"""A scrape goes through kubectl exec, which takes its time on a busy machine."""


@pytest.mark.timeout(900)
def test_prometheus_sees_all_of_it(job: dict[str, Any], jobs: Jobs, target: Target, tmp_path: Path) -> None:
    kube = target.kube
    job["spec"]["recipe"]["until"] = {"steps": 100_000}
    job["spec"].setdefault("carbonPolicy", {}).setdefault("zone", "SE")
    ways = ThroughExec(target, tmp_path)
    with discovering(ways), proxy(ways) as way:
        made = config(tmp_path, interval=INTERVAL, rules_interval="5s", proxy_url=way)
        with Prometheus(tmp_path, made) as prometheus:
            began = time.time()
            run = jobs.run(job, "watched")
            started(run)
            run.wait_for("a checkpoint", lambda: run.curve().last_step() > EVERY + 3, 240)
            replicas = {pod["metadata"]["name"]: f"{SYSTEM}/{OPERATOR}" for pod in operator_pods(target)}

            def up() -> dict[str, str]:
                found = prometheus.get("query", query="up == 1")["result"]
                return {series["metric"]["pod"]: series["metric"]["job"] for series in found}

            # An increase is seen only by who has looked before it.
            wait_until("the operator has been scraped", lambda: up().items() >= replicas.items(), 120)
            recover(run, slot=1)
            pods = {run.pod_of_slot(0): run.name, run.pod_of_slot(1): run.name}
            wait_until("every target is up, under its job's name", lambda: up() == pods | replicas, 120)
            time.sleep(60)  # some scrapes and evaluations after the recovery
            targets = prometheus.get("query", query="up")["result"]
            assert len(targets) == len(pods | replicas), "a target that nobody serves"
            check_catalogue(prometheus)
            for query in of_panels():
                check_panel(prometheus, query, kube.namespace, run.name, began)
            for query in of_rules():
                check_rule(prometheus, query, began)
            told = prometheus.get("query", query=f'trireme_job_info{{job="{run.name}"}}')["result"]
            assert [series["metric"]["namespace"] for series in told] == [kube.namespace]
            assert prometheus.get("query", query=f'trireme_leader{{namespace="{SYSTEM}"}}')["result"]
