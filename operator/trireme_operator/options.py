"""Flags and environment of the operator. A flag wins over its variable."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trireme_api.protocol import COORDINATOR_PORT

DEFAULT_NAMESPACE = "trireme-system"
COORDINATOR_SERVICE = "trireme-coordinator"
PULL_POLICIES = ("", "Always", "IfNotPresent", "Never")


class BadOptions(ValueError):
    """One line: the option and what would be right."""


@dataclass(frozen=True)
class Options:
    kubeconfig: str | None
    namespaces: tuple[str, ...]
    """Served ones; empty: all."""
    own_namespace: str
    identity: str
    trainer_image: str
    agent_image: str
    image_pull_policy: str | None
    coordinator_host: str
    coordinator_port: int
    coordinator_url: str
    """What pods are told."""
    metrics_port: int
    watch_nodes: bool
    workers: int
    qps: float
    lease_name: str
    lease_seconds: float
    ca_secret: str
    resync_seconds: float
    progress_seconds: float
    gang_seconds: float
    shrink_seconds: float
    snooze_seconds: float
    powercap: str | None
    carbon_settings: Path | None
    carbon_secrets: Path | None
    tracing: str
    log_format: str
    log_level: str


def parse(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Raises BadOptions; argparse itself ends the process on an unknown flag."""
    parser = argparse.ArgumentParser(prog="trireme-operator", description="Runs TrainingJobs.")

    def option(flag: str, variable: str, default: str, text: str) -> None:
        parser.add_argument(flag, default=environ.get(variable) or default, help=f"{text} [{variable}]")

    option(
        "--kubeconfig", "TRIREME_KUBECONFIG", "", "file to reach the cluster with; left out: the pod's service account"
    )
    option("--namespaces", "TRIREME_NAMESPACES", "", "namespaces to serve, comma separated; left out: all")
    option("--own-namespace", "POD_NAMESPACE", DEFAULT_NAMESPACE, "where the lease and the CA's secret live")
    option("--identity", "POD_NAME", "", "name of this replica in the lease; must be unique")
    option("--trainer-image", "TRIREME_TRAINER_IMAGE", "trireme/trainer:0.1.0", "image of pods that run a recipe")
    option("--agent-image", "TRIREME_AGENT_IMAGE", "trireme/agent:0.1.0", "image that brings the agent")
    option("--image-pull-policy", "TRIREME_IMAGE_PULL_POLICY", "", "of the two images above")
    option("--coordinator-host", "TRIREME_COORDINATOR_LISTEN", "0.0.0.0", "address to listen on for agents")
    option(
        "--coordinator-port", "TRIREME_COORDINATOR_PORT_NUMBER", str(COORDINATOR_PORT), "port to listen on for agents"
    )
    option("--coordinator-url", "TRIREME_COORDINATOR_URL", "", "URL that agents use; left out: the Service's address")
    option("--metrics-port", "TRIREME_OPERATOR_METRICS_PORT", "8080", "port of /metrics, /healthz and /readyz")
    parser.add_argument(
        "--watch-nodes",
        action=argparse.BooleanOptionalAction,
        default=_yes("TRIREME_WATCH_NODES", environ.get("TRIREME_WATCH_NODES") or "true"),
        help="read nodes for gang admission and node loss (needs the ClusterRole trireme-operator-nodes) "
        "[TRIREME_WATCH_NODES]",
    )
    option("--workers", "TRIREME_WORKERS", "16", "jobs looked at concurrently")
    option("--qps", "TRIREME_API_QPS", "200", "requests per second to the API server, twice that in bursts")
    option("--lease-name", "TRIREME_LEASE", "trireme-operator", "name of the leader lease")
    option("--lease-seconds", "TRIREME_LEASE_SECONDS", "15", "after so long without renewal another replica may lead")
    option("--ca-secret", "TRIREME_CA_SECRET", "trireme-coordinator-ca", "secret of the coordinator's CA")
    option("--resync-seconds", "TRIREME_RESYNC_SECONDS", "60", "between LISTs that put the view right")
    option("--progress-seconds", "TRIREME_PROGRESS_SECONDS", "5", "between status writes that only carry figures")
    option("--gang-seconds", "TRIREME_GANG_SECONDS", "120", "a gang not wholly placed by then queues again")
    option("--shrink-seconds", "TRIREME_SHRINK_SECONDS", "10", "an elastic gang waits so long for a pod to find a node")
    option("--snooze-seconds", "TRIREME_SNOOZE_SECONDS", "60", "from a shrink until the gang may grow; doubles")
    option("--powercap", "TRIREME_POWERCAP", "", "folder of every node with its RAPL counters, to mount into pods")
    option("--carbon-settings", "TRIREME_CARBON_SETTINGS", "", "file with zones and the provider of carbon intensity")
    option("--carbon-secrets", "TRIREME_CARBON_SECRETS", "", "folder with the provider's token, or username, password")
    option("--tracing", "TRIREME_TRACING", "off", "off, or otlp: OpenTelemetry spans, set up by the OTEL_* variables")
    option("--log-format", "TRIREME_LOG_FORMAT", "text", "text or json, of the pods it makes too")
    option("--log-level", "TRIREME_LOG_LEVEL", "info", "debug, info, warning or error")
    given = parser.parse_args(list(arguments))
    port = _whole("--coordinator-port", given.coordinator_port, 0, 65535)
    return Options(
        kubeconfig=given.kubeconfig or None,
        namespaces=tuple(filter(None, (name.strip() for name in given.namespaces.split(",")))),
        own_namespace=given.own_namespace,
        identity=given.identity or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
        trainer_image=given.trainer_image,
        agent_image=given.agent_image,
        image_pull_policy=_one_of("--image-pull-policy", given.image_pull_policy, PULL_POLICIES) or None,
        coordinator_host=given.coordinator_host,
        coordinator_port=port,
        coordinator_url=given.coordinator_url or _service_url(environ, given.own_namespace, port),
        metrics_port=_whole("--metrics-port", given.metrics_port, 0, 65535),
        watch_nodes=given.watch_nodes,
        workers=_whole("--workers", given.workers, 1, 256),
        qps=_number("--qps", given.qps, 1, 10_000),
        lease_name=given.lease_name,
        lease_seconds=_number("--lease-seconds", given.lease_seconds, 1, 600),
        ca_secret=given.ca_secret,
        resync_seconds=_number("--resync-seconds", given.resync_seconds, 1, 3600),
        progress_seconds=_number("--progress-seconds", given.progress_seconds, 0, 3600),
        gang_seconds=_number("--gang-seconds", given.gang_seconds, 1, 86_400),
        shrink_seconds=_number("--shrink-seconds", given.shrink_seconds, 0, 86_400),
        snooze_seconds=_number("--snooze-seconds", given.snooze_seconds, 1, 3600),
        powercap=_absolute("--powercap", given.powercap),
        carbon_settings=Path(given.carbon_settings) if given.carbon_settings else None,
        carbon_secrets=Path(given.carbon_secrets) if given.carbon_secrets else None,
        tracing=_one_of("--tracing", given.tracing, ("off", "otlp")),
        log_format=_one_of("--log-format", given.log_format, ("text", "json")),
        log_level=_one_of("--log-level", given.log_level, ("debug", "info", "warning", "error")),
    )


def _service_url(environ: Mapping[str, str], namespace: str, port: int) -> str:
    """The coordinator Service's cluster IP, so that pods need no DNS: from the kubelet's environment, else by name."""
    host = environ.get("TRIREME_COORDINATOR_SERVICE_HOST", "")
    number = environ.get("TRIREME_COORDINATOR_SERVICE_PORT", str(port))
    if not host:
        name = f"{COORDINATOR_SERVICE}.{namespace}.svc"
        try:
            host = socket.gethostbyname(name)
        except OSError:
            raise BadOptions(
                f"--coordinator-url: not given, and there is no Service {COORDINATOR_SERVICE} in the environment or as "
                f"{name}; apply it before the operator, or give the URL"
            ) from None
    return f"https://[{host}]:{number}" if ":" in host else f"https://{host}:{number}"


def _yes(name: str, text: str) -> bool:
    return _one_of(name, text.strip().lower(), ("true", "false")) == "true"


def _whole(flag: str, text: str, low: int, high: int) -> int:
    value = _number(flag, text, low, high)
    if value != int(value):
        raise BadOptions(f"{flag}: must be a whole number (got {text!r})")
    return int(value)


def _number(flag: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise BadOptions(f"{flag}: must be a number from {low:g} to {high:g} (got {text!r})")
    return value


def _absolute(flag: str, text: str) -> str | None:
    if text and (not text.startswith("/") or ".." in text.split("/")):
        raise BadOptions(f"{flag}: must be an absolute path without .. (got {text!r})")
    return text or None


def _one_of(flag: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise BadOptions(f"{flag}: must be one of {', '.join(filter(None, known))} (got {text!r})")
    return text
