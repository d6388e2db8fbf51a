"""Every query of the dashboards and rules, and whether a Prometheus has data for it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from localcluster.prometheus import Prometheus
from trireme_api.metrics import METRICS

MONITORING = Path(__file__).resolve().parents[2] / "manifests" / "monitoring"
SELECTOR = re.compile(r"""(?<![\w:"])((?:trireme_|namespace_job)[\w:]*|(?={__name__))(\{[^}]*\})?""")
METRIC = re.compile(r"\btrireme_\w+")
NO_DATA = {
    # The peak of a CPU is not known, so there is no utilisation.
    "trireme_job_mfu", "trireme_train_mfu", "trireme_train_mfu_palm", "trireme_train_hfu",
    # No GPU; and every counter of the CPUs can be read or is declared.
    "trireme_gpu_energy_joules_total", 'trireme_cpu_energy_joules_total{source="missing"}',
    # The job has no budget and does not train in fp16.
    "trireme_job_carbon_budget_grams", "trireme_train_loss_scale",
}  # fmt: skip
"""Series that a job on CPUs has not; of any other, nothing but data will do."""
EITHER = {
    # Memory is counted, or declared, on some machines only.
    'trireme_dram_energy_joules_total{source!="missing"}',
    # How long old ranks took to end; nothing is told where none was left when the new attempt came.
    "job: Newest recovery: C",
}  # fmt: skip
"""Selectors and panels' queries that may have data or not."""
NO_RESULT = {"job: MFU: A", "job: MFU: B", "job: MFU: C", "job: CO2e: B", "carbon: Budget used: A"}
"""Queries of panels that ask for nothing else."""
NO_FAMILY = {name for name in NO_DATA if name.startswith(("trireme_train", "trireme_gpu"))}
"""The trainer and the agent say nothing of what they do not know; the operator names the family."""


@dataclass(frozen=True)
class Query:
    where: str
    text: str


def boards() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((MONITORING / "dashboards").glob("*.json"))}


def of_panels() -> Iterator[Query]:
    for name, board in boards().items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield Query(f"{name}: {panel['title']}: {target['refId']}", target["expr"])
        for mark in board["annotations"].get("list", []):
            yield Query(f"{name}: annotation {mark['name']}", mark["expr"])


def of_rules() -> Iterator[Query]:
    for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]:
        for rule in group["rules"]:
            yield Query(rule.get("alert") or rule["record"], rule["expr"])


def chosen(text: str, namespace: str, job: str) -> str:
    """A panel's query with the dashboard's variables filled in."""
    return text.replace("$namespace", namespace).replace("$job", job)


def selectors(text: str) -> list[str]:
    """What a query reads: an alert that does not fire has no result, but its series must be there."""
    return [found.group(0) for found in SELECTOR.finditer(text)]


def check_panel(prometheus: Prometheus, query: Query, namespace: str, job: str, began: float) -> None:
    """It has a value at some time since `began`."""
    now = time.time()
    everything = query.where.partition(":")[0] != "job"
    asked = chosen(query.text, ".*" if everything else namespace, job)
    step = max(1.0, (now - began) / 200)
    found = prometheus.get("query_range", query=asked, start=began, end=now, step=step)["result"]
    data = any(not math.isnan(float(value)) for series in found for _, value in series["values"])
    assert query.where in EITHER or data != (query.where in NO_RESULT), f"{query.where}: {asked}"


def check_rule(prometheus: Prometheus, query: Query, began: float) -> None:
    """All that it reads is there; an alert that does not fire has no result of its own."""
    read = selectors(query.text)
    assert read
    for selector in set(read) - EITHER:
        found = prometheus.get("series", **{"match[]": selector, "start": began, "end": time.time()})
        expected = selector not in NO_DATA and selector.partition("{")[0] not in NO_DATA
        assert bool(found) == expected, f"{query.where}: {selector}"


def check_catalogue(prometheus: Prometheus) -> None:
    """What is served is what the catalogue says: names, types, help."""
    told = prometheus.get("metadata")
    seen = {name: entries[0] for name, entries in told.items() if name.startswith("trireme_")}
    for name, entry in seen.items():
        kind = "untyped" if entry["type"] == "unknown" else entry["type"]
        assert (kind, entry["help"]) == (METRICS[name].kind, METRICS[name].help), name
    assert set(METRICS) - set(seen) == NO_FAMILY
