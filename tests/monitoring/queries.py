"""Every query of the dashboards and rules, and whether a Prometheus has data for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from localcluster.prometheus import Prometheus

MONITORING = Path(__file__).resolve().parents[2] / "manifests" / "monitoring"
SELECTOR = re.compile(r"""(?<![\w:"])((?:trireme_|namespace_job)[\w:]*|(?={__name__))(\{[^}]*\})?""")
METRIC = re.compile(r"\btrireme_\w+")


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


def has_data(prometheus: Prometheus, text: str, begin: float, end: float) -> bool:
    step = max(1.0, (end - begin) / 200)
    result = prometheus.get("query_range", query=text, start=begin, end=end, step=step)["result"]
    return any(not math.isnan(float(value)) for series in result for _, value in series["values"])


def has_series(prometheus: Prometheus, selector: str, begin: float, end: float) -> bool:
    return bool(prometheus.get("series", **{"match[]": selector, "start": begin, "end": end}))
