"""A real Prometheus scrapes the operator and the pods of a job that trains and loses a rank, by what
manifests/monitoring says; every query of every panel and rule finds data."""

from __future__ import annotations

import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cluster"), str(ROOT / "tests" / "monitoring")]

from e2e_support import EVERY, Jobs, operator_pods  # noqa: E402
from localcluster.prometheus import Prometheus  # noqa: E402
from queries import check_catalogue, check_panel, check_rule, of_panels, of_rules  # noqa: E402
from scraping import config, discover  # noqa: E402

from demo.kube import wait_until  # noqa: E402
from demo.report import DemoError  # noqa: E402
from demo.target import OPERATOR, SYSTEM, Target  # noqa: E402
from demo.training import recover, started  # noqa: E402

INTERVAL = "10s"
"""A scrape goes through kubectl exec, which takes its time on a busy machine."""


class Ways:
    """How Prometheus reaches pods from outside the cluster: it is told of them by their own addresses, and its requests
    are made inside the pod, for the machine itself has no way to them."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._folder = target, folder
        self._names: dict[str, tuple[str, str]] = {}
        """Namespace and name of a pod by its IP."""

    def fetch(self, url: str) -> str:
        parts = urllib.parse.urlsplit(url)
        namespace, name = self._names[parts.hostname or ""]
        page = f"http://127.0.0.1:{parts.port}/metrics"
        script = f"import urllib.request as u; print(u.urlopen({page!r}).read().decode())"
        return self._target.kube.within(namespace).exec(name, "python3", "-c", script, timeout=10)

    def discover(self) -> None:
        pods = self._target.kube.items("pods", "trireme.dev/managed=true")
        replicas = operator_pods(self._target)
        for pod in (*pods, *replicas):
            if pod["status"].get("podIP") and pod["status"].get("phase") == "Running":
                self._names[pod["status"]["podIP"]] = pod["metadata"]["namespace"], pod["metadata"]["name"]
        discover(self._folder, pods, replicas, ports)


def ports(pod: dict[str, Any]) -> dict[str, str]:
    address = pod["status"].get("podIP")
    declared = [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    return {port["name"]: f"{address}:{port['containerPort']}" for port in declared} if address else {}


@contextmanager
def proxy(ways: Ways) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                body, status = ways.fetch(self.path).encode(), 200
            except (DemoError, KeyError) as error:
                body, status = str(error).encode(), 502
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # Prometheus waits no longer
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def discovering(ways: Ways) -> Iterator[None]:
    """Does so again every two seconds."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(2.0):
            with suppress(DemoError):
                ways.discover()

    ways.discover()
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


@pytest.mark.timeout(900)
def test_prometheus_sees_all_of_it(job: dict[str, Any], jobs: Jobs, target: Target, tmp_path: Path) -> None:
    kube = target.kube
    job["spec"]["recipe"]["until"] = {"steps": 100_000}
    job["spec"].setdefault("carbonPolicy", {}).setdefault("zone", "SE")
    ways = Ways(target, tmp_path)
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
