"""A Prometheus that scrapes the operator and the job's pods over the cluster's own network. Not by `kubectl exec`: its
programs would run on the pods' account."""

from __future__ import annotations

import ctypes
import itertools
import os
import urllib.request
from pathlib import Path
from typing import Any

from chaos.cluster import NAMESPACE, ClusterArena
from localcluster.forwarder import CLONE_NEWNET
from localcluster.netns import FOLDER
from localcluster.prometheus import Prometheus
from scraping import discover
from ways import ports

from demo.target import OPERATOR, SYSTEM

TIMEOUT = 5.0


class OverTheNetwork:
    """Pages are fetched by threads that have entered the control plane's network namespace, one thread a page."""

    def __init__(self, arena: ClusterArena, folder: Path) -> None:
        self._api, self._folder = arena.api, folder
        self._namespace = FOLDER / arena.cluster.require().plan.control_namespace
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fetch(self, url: str) -> str:
        descriptor = os.open(self._namespace, os.O_RDONLY)
        try:
            if self._libc.setns(descriptor, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {self._namespace}")
        finally:
            os.close(descriptor)
        with self._direct.open(url, timeout=TIMEOUT) as answer:
            return str(answer.read().decode())

    def discover(self) -> None:
        discover(
            self._folder, self._pods(NAMESPACE, "trireme.dev/managed=true"),
            self._pods(SYSTEM, f"app.kubernetes.io/name={OPERATOR}"), ports,
        )  # fmt: skip

    def _pods(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        return list(self._api.request("GET", f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")["items"])


def by_labels(prometheus: Prometheus, job: str, name: str, label: str = "") -> dict[str, float]:
    """The newest value of each series of a job, by one of its labels."""
    found = prometheus.get("query", query=f'{name}{{namespace="{NAMESPACE}",job="{job}"}}')["result"]
    return {series["metric"].get(label, ""): float(series["value"][1]) for series in found}


def history(prometheus: Prometheus, job: str, name: str, seconds: float) -> list[list[float]]:
    """All values of each series of a job in the last so many seconds, oldest first."""
    query = f'{name}{{namespace="{NAMESPACE}",job="{job}"}}[{int(seconds)}s]'
    found = prometheus.get("query", query=query)["result"]
    return [[float(value) for _, value in series["values"]] for series in found]


def counted(values: list[float]) -> float:
    """What a counter has counted, which began anew at zero wherever it went back."""
    ends = [before for before, after in itertools.pairwise(values) if after < before]
    return sum(ends) + values[-1]
