"""How a Prometheus outside the cluster reaches the pods in it."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from e2e_support import operator_pods
from scraping import discover

from demo.report import DemoError
from demo.target import Target


class Ways(Protocol):
    def fetch(self, url: str) -> str:
        """The page, or DemoError, OSError or KeyError."""

    def discover(self) -> None:
        """Tells Prometheus which pods there are."""


class ThroughExec:
    """Prometheus is told of pods by their own addresses, and its requests are made inside the pod, for the machine
    itself has no way to them."""

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
            except (DemoError, KeyError, OSError) as error:
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
