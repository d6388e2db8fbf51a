"""The agent's own /metrics and /healthz, in Prometheus text format (version 0.0.4)."""

from __future__ import annotations

import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Dict, List, Optional, Tuple

from trireme_api.protocol import AgentState, Report

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = Tuple[Dict[str, str], float]


def render(report: Optional[Report], unheard: float, restarts: int) -> str:
    """All series of one pod; labels that identify the pod are the scraper's business."""
    if report is None:
        return ""
    out: List[str] = []
    states = [({"state": s.value}, 1.0 if s is report.state else 0.0) for s in AgentState]
    _family(out, "trireme_agent_state", "gauge", "1 for the state the agent is in.", states)
    attempt: List[Sample] = [({}, float(report.attempt))]
    _family(out, "trireme_agent_attempt", "gauge", "Attempt the agent holds; 0 before the first.", attempt)
    _family(out, "trireme_agent_starts_total", "counter", "Times this agent started its ranks.", [({}, restarts)])
    _family(
        out, "trireme_agent_coordinator_unheard_seconds", "gauge", "Seconds since the coordinator last answered.",
        [({}, unheard)],
    )
    ranks = report.ranks
    _family(
        out, "trireme_agent_rank_up", "gauge", "1 while the rank's process is alive.",
        [({"local_rank": str(r.local_rank)}, 0.0 if r.exit is not None or r.pid is None else 1.0) for r in ranks],
    )
    _family(
        out, "trireme_agent_rank_step", "gauge", "Step of the rank's last heartbeat.",
        [({"local_rank": str(r.local_rank)}, float(r.step)) for r in ranks if r.step is not None],
    )
    _family(
        out, "trireme_agent_rank_heartbeat_age_seconds", "gauge", "Seconds since the rank's heartbeat last changed.",
        [({"local_rank": str(r.local_rank)}, r.heartbeat_age) for r in ranks if r.heartbeat_age is not None],
    )
    for component in ("gpu", "cpu", "dram"):
        reading = report.energy.get(component)
        if reading is None:
            continue
        labels = {"source": reading.source}
        _family(
            out, f"trireme_{component}_energy_joules_total", "counter",
            "Energy of this pod since the agent started; NaN where the source is missing.",
            [(labels, reading.joules if reading.joules is not None else math.nan)],
        )
    return "\n".join(out) + "\n"


def _family(out: List[str], name: str, kind: str, text: str, samples: List[Sample]) -> None:
    if not samples:
        return
    out.append(f"# HELP {name} {text}")
    out.append(f"# TYPE {name} {kind}")
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
