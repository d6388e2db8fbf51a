"""A Prometheus configuration that does what the Prometheus operator makes of manifests/monitoring: the same discovery,
selection, labels and rules. Prometheus itself reads no PodMonitor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).resolve().parents[2] / "manifests" / "monitoring"
Json = dict[str, Any]
Ports = Callable[[Json], dict[str, str]]
"""From a pod to host:port by the name of each of its ports."""


def config(folder: Path, *, interval: str = "15s", rules_interval: str = "", **http: str) -> Json:
    """prometheus.yml; writes the rules beside it. `interval` and `rules_interval` make haste for a test; `http` goes
    into each scrape configuration. Targets are read from the files that `discover` writes."""
    spec = _read("rules.yaml")["spec"]
    for group in spec["groups"] if rules_interval else ():
        group["interval"] = rules_interval
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rules.yml").write_text(yaml.safe_dump(spec))
    pods, services = _read("podmonitor.yaml"), _read("servicemonitor.yaml")
    monitors = [
        (pods, "pod", "pod", pods["spec"]["podMetricsEndpoints"]),
        (services, "endpoints", "service", services["spec"]["endpoints"]),
    ]
    scrapes = [
        {**_scrape(monitor, role, of, endpoint, interval), **_files(folder, role), **http}
        for monitor, role, of, endpoints in monitors
        for endpoint in endpoints
    ]
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": rules_interval or "30s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": scrapes,
    }


def _read(name: str) -> Json:
    found: Json = yaml.safe_load((MONITORING / name).read_text())
    return found


def _files(folder: Path, role: str) -> Json:
    return {"file_sd_configs": [{"files": [str(folder / f"targets-{role}.json")], "refresh_interval": "1s"}]}


def discover(folder: Path, pods: Iterable[Json], replicas: Iterable[Json], ports: Ports) -> None:
    """Tells Prometheus of training pods and of the operator's, with the labels of its Kubernetes discovery: Debian
    builds it without that."""
    service: Json = {
        f"__meta_kubernetes_service_label_{sane(key)}": value
        for key, value in _read("servicemonitor.yaml")["spec"]["selector"]["matchLabels"].items()
    }
    container, endpoint = "pod_container_port_name", "endpoint_port_name"
    by_role = {
        "pod": [_target(pod, container, *port) for pod in pods for port in ports(pod).items()],
        "endpoints": [_target(pod, endpoint, *port, **service) for pod in replicas for port in ports(pod).items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for role, targets in by_role.items():
        path = folder / f"targets-{role}.json"
        path.with_suffix(".new").write_text(json.dumps(targets))
        path.with_suffix(".new").rename(path)


def _target(pod: Json, port_label: str, port: str, address: str, **more: str) -> Json:
    metadata = pod["metadata"]
    labels = {
        "namespace": metadata["namespace"], "pod_name": metadata["name"], "pod_container_name": "main",
        "pod_node_name": pod["spec"].get("nodeName", ""), "pod_phase": pod["status"].get("phase", "Pending"),
        **{f"pod_label_{sane(key)}": value for key, value in metadata.get("labels", {}).items()}, port_label: port,
    }  # fmt: skip
    return {"targets": [address], "labels": {f"__meta_kubernetes_{key}": v for key, v in labels.items()} | more}


def _scrape(monitor: Json, role: str, of: str, endpoint: Json, interval: str) -> Json:
    spec, name = monitor["spec"], monitor["metadata"]["name"]
    port = "pod_container_port_name" if role == "pod" else "endpoint_port_name"
    keep = [
        {"source_labels": [f"__meta_kubernetes_{of}_label_{sane(label)}"], "regex": value, "action": "keep"}
        for label, value in spec["selector"]["matchLabels"].items()
    ]
    keep.append({"source_labels": [f"__meta_kubernetes_{port}"], "regex": endpoint["port"], "action": "keep"})
    keep.append(
        {"source_labels": ["__meta_kubernetes_pod_phase"], "regex": "(Failed|Succeeded)", "action": "drop"}
    )
    if not spec.get("namespaceSelector", {}).get("any"):
        own = monitor["metadata"]["namespace"]
        keep.append({"source_labels": ["__meta_kubernetes_namespace"], "regex": own, "action": "keep"})
    put = [
        {"source_labels": [f"__meta_kubernetes_{meta}"], "target_label": label}
        for meta, label in (("namespace", "namespace"), ("pod_name", "pod"), ("pod_container_name", "container"))
    ]
    job = {"target_label": "job", "replacement": f"{monitor['metadata']['namespace']}/{name}"}
    return {
        "job_name": f"{monitor['kind']}/{name}",
        "scrape_interval": interval,
        "scrape_timeout": interval,
        "metrics_path": endpoint["path"],
        "honor_labels": endpoint.get("honorLabels", False),
        "sample_limit": spec.get("sampleLimit", 0),
        "relabel_configs": [*keep, *put, job, *map(snake, endpoint.get("relabelings", []))],
        "metric_relabel_configs": [snake(rule) for rule in endpoint.get("metricRelabelings", [])],
    }


def snake(rule: Json) -> Json:
    """camelCase of the custom resources → snake_case of prometheus.yml."""
    return {re.sub(r"([A-Z])", lambda match: "_" + match[1].lower(), key): value for key, value in rule.items()}


def sane(label: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", label)
