"""What the agent is told through its environment and arguments."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence
from urllib.parse import urlsplit

from trireme_api.protocol import AGENT_METRICS_PORT, Env

from trireme_agent import rapl
from trireme_agent.energy import Declared

TRAINER_MODULE = "trireme_trainer"
DEFAULT_TERMINATION_LOG = "/dev/termination-log"


class BadSettings(ValueError):
    """One line: the variable that is wrong and what would be right."""


@dataclass(frozen=True)
class Settings:
    job: str
    namespace: str
    pod: str
    pod_uid: str
    coordinator: str
    """Base URL."""
    coordinator_ca: Optional[str]
    """Path of a PEM file, or PEM text; None: the system's CAs."""
    token_file: Optional[str]
    command: List[str]
    """Argument vector of every rank."""
    work_dir: str
    """Heartbeats and stop files; one folder per attempt."""
    log_dir: str
    metrics_port: Optional[int]
    declared: Declared
    powercap: str
    """Folder of the RAPL counters."""
    patience: float
    """Seconds without any answer after which a failed pod stops waiting for a decision."""
    report_seconds: float
    kill_grace: float
    """Seconds between SIGTERM and SIGKILL when ranks of an old attempt are cleared away: their peers are gone, so
    they have nothing to save, and every one of these seconds is down time."""
    termination_log: str
    warm_start: bool
    json_logs: bool = False
    environment: Dict[str, str] = field(default_factory=dict)
    """What ranks inherit."""

    @property
    def own_script(self) -> bool:
        return self.command[1:] != ["-m", TRAINER_MODULE]


def from_environment(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Reads `[--] command…` (empty: the trainer) and the TRIREME_* variables. Raises BadSettings."""
    command = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    if command[:1] and command[0].startswith("-"):
        raise BadSettings(f"unknown option {command[0]}; put your own command after `--`")
    coordinator = _required(environ, Env.COORDINATOR)
    url = urlsplit(coordinator)
    local = url.hostname in ("127.0.0.1", "::1", "localhost")
    if url.scheme != "https" and not (url.scheme == "http" and local):
        raise BadSettings(f"{Env.COORDINATOR}={coordinator!r} must be an https:// URL (http:// only on this machine)")
    work_dir = environ.get(Env.HEARTBEAT_DIR) or tempfile.mkdtemp(prefix="trireme-")
    return Settings(
        job=_required(environ, Env.JOB),
        namespace=_required(environ, Env.NAMESPACE),
        pod=_required(environ, Env.POD),
        pod_uid=_required(environ, Env.POD_UID),
        coordinator=coordinator.rstrip("/"),
        coordinator_ca=environ.get(Env.COORDINATOR_CA) or None,
        token_file=environ.get(Env.TOKEN_FILE) or None,
        command=command or [sys.executable or "python3", "-m", TRAINER_MODULE],
        work_dir=work_dir,
        log_dir=environ.get(Env.LOG_DIR) or os.path.join(work_dir, "logs"),
        metrics_port=_metrics_port(environ),
        declared=Declared(
            _number(environ, Env.CPU_WATTS_PER_CORE, None), _number(environ, Env.DRAM_WATTS_PER_GIGABYTE, None),
            _number(environ, Env.GPU_WATTS, None),
        ),
        powercap=environ.get(Env.POWERCAP) or rapl.ROOT,
        patience=_number(environ, Env.AGENT_PATIENCE_SECONDS, 600.0) or 0.0,
        report_seconds=_number(environ, Env.AGENT_REPORT_SECONDS, 5.0) or 5.0,
        kill_grace=0.25,
        termination_log=environ.get(Env.TERMINATION_LOG) or DEFAULT_TERMINATION_LOG,
        warm_start=environ.get(Env.AGENT_WARM_START) == "1",
        json_logs=_json_logs(environ),
        environment=dict(environ),
    )


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise BadSettings(f"{name} is not set; the operator (or `trireme run`) sets it for the agent")
    return value


def _json_logs(environ: Mapping[str, str]) -> bool:
    text = environ.get(Env.LOG_FORMAT) or "text"
    if text not in ("text", "json"):
        raise BadSettings(f"{Env.LOG_FORMAT}={text!r} must be text or json")
    return text == "json"


def _number(environ: Mapping[str, str], name: str, default: Optional[float]) -> Optional[float]:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadSettings(f"{name}={text!r} must be a number, 0 or more")
    return value


def _metrics_port(environ: Mapping[str, str]) -> Optional[int]:
    text = environ.get(Env.AGENT_METRICS_PORT, "")
    if text == "off":
        return None
    if not text:
        return AGENT_METRICS_PORT
    if not text.isdigit() or int(text) > 65535:
        raise BadSettings(f"{Env.AGENT_METRICS_PORT}={text!r} must be a port number, 0 for any, or `off`")
    return int(text)
