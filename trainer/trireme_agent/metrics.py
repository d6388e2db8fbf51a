"""The agent's /metrics and /healthz, in Prometheus text format (version 0.0.4): its own series and its trainer's."""

from __future__ import annotations

import http.client
import math
import re
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from trireme_api.metrics import METRICS
from trireme_api.protocol import AgentState, Report

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_RELAYED_BYTES = 1 << 20
Sample = Tuple[Dict[str, str], float]
_OF_THE_TRAINER = re.compile(r"(# (HELP|TYPE) )?trireme_train_\w+[ {]")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def render(report: Optional[Report], unheard: float, restarts: int) -> str:
    """All series of one pod; labels that identify the pod are the scraper's business."""
    if report is None:
        return ""
    out: List[str] = []
    states = [({"state": s.value}, 1.0 if s is report.state else 0.0) for s in AgentState]
    _family(out, "trireme_agent_state", states)
    _family(out, "trireme_agent_attempt", [({}, float(report.attempt))])
    _family(out, "trireme_agent_starts_total", [({}, float(restarts))])
    _family(out, "trireme_agent_coordinator_unheard_seconds", [({}, unheard)])
    ranks = [({"local_rank": str(rank.local_rank)}, rank) for rank in report.ranks]
    alive = [(of, 0.0 if rank.exit is not None or rank.pid is None else 1.0) for of, rank in ranks]
    _family(out, "trireme_agent_rank_up", alive)
    steps = [(of, float(rank.step)) for of, rank in ranks if rank.step is not None]
    _family(out, "trireme_agent_rank_step", steps)
    ages = [(of, rank.heartbeat_age) for of, rank in ranks if rank.heartbeat_age is not None]
    _family(out, "trireme_agent_rank_heartbeat_age_seconds", ages)
    for component in ("gpu", "cpu", "dram"):
        reading = report.energy.get(component)
        if reading is not None:
            joules = reading.joules if reading.joules is not None else math.nan
            _family(out, f"trireme_{component}_energy_joules_total", [({"source": reading.source}, joules)])
    return "\n".join(out) + "\n"


def relayed(port: int, timeout: float = 1.0) -> str:
    """The series of the trainer in this pod; none where it serves none, as on all nodes but that of global rank 0. So
    only what is there is scraped, and no target counts as down because its rank is another one."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": "text/plain;version=0.0.4"})
    try:
        with _DIRECT.open(request, timeout=timeout) as answer:
            text = answer.read(MAX_RELAYED_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException):
        return ""
    lines = [line for line in text.split("\n")[:-1] if _OF_THE_TRAINER.match(line)]
    return "\n".join(lines) + "\n" if lines else ""


def _family(out: List[str], name: str, samples: Sequence[Sample]) -> None:
    if not samples:
        return
    metric = METRICS[name]
    out.append(f"# HELP {name} {metric.help}")
    out.append(f"# TYPE {name} {metric.kind}")
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
        out.append(f"{name}{{{inner}}} {_number(value)}" if inner else f"{name} {_number(value)}")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else repr(float(value))


class MetricsServer:
    """Serves `text()` at /metrics, on all addresses: the scraper comes from outside the pod."""

    def __init__(self, port: int, text: Callable[[], str]) -> None:
        """Raises OSError when the port is taken."""

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                answer = text() if path == "/metrics" else "ok\n" if path == "/healthz" else None
                body = (answer if answer is not None else "not found\n").encode()
                self.send_response(200 if answer is not None else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("", port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
