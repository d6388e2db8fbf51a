"""The coordinator of one machine: speaks the same protocol to the same agent, without Kubernetes.

One pod, no barrier to wait for but the agent's own. Decides like the operator: failures that cannot mend themselves end
the run, others restart the ranks in place within a budget, and the same cause again and again without progress ends it.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from trireme_api.protocol import (
    Action,
    AgentState,
    Assignment,
    Cause,
    CheckpointRef,
    ExitCode,
    Failure,
    ProtocolError,
    Report,
    retryable,
)

SAME_CAUSE_WITHOUT_PROGRESS = 3
MAX_BODY = 1024 * 1024


@dataclass(frozen=True)
class Restart:
    """A failure that was followed by a restart, or the last one, that was not."""

    failure: Failure
    attempt: int
    step: int


@dataclass(frozen=True)
class Verdict:
    restart: bool
    reason: str


def decide(failure: Failure, step: int, before: Sequence[Restart], max_restarts: int) -> Verdict:
    """Whether to try again after this failure at `step`, given the ones before it."""
    if not retryable(failure.cause):
        return Verdict(False, f"{failure.cause.value}: trying again cannot help")
    if len(before) >= max_restarts:
        return Verdict(False, f"all {max_restarts} restarts are used up; --max-restarts allows more")
    same = 1
    for restart in reversed(before):
        if restart.failure.cause is not failure.cause or restart.step < step:
            break
        same += 1
    if same >= SAME_CAUSE_WITHOUT_PROGRESS:
        return Verdict(False, f"{same} times {failure.cause.value} in a row without any progress")
    return Verdict(True, f"restart {len(before) + 1} of {max_restarts}")


@dataclass
class View:
    """What is known of the run; read by the display."""

    report: Report | None = None
    failures: list[Restart] = field(default_factory=list)
    verdict: Verdict | None = None
    energy: dict[str, tuple[float | None, str]] = field(default_factory=dict)
    checkpoint: CheckpointRef | None = None
    best_step: int = 0
    pids: set[int] = field(default_factory=set)
    """Every rank that was started."""

    @property
    def restarts(self) -> int:
        return len(self.failures) - (1 if self.verdict is not None and not self.verdict.restart else 0)


class LocalCoordinator:
    def __init__(
        self, *, procs: int, first_attempt: int, max_restarts: int, grace_seconds: float,
        on_event: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.token = secrets.token_urlsafe(32)
        self.view = View()
        self._procs, self._max_restarts, self._grace = procs, max_restarts, grace_seconds
        self._on_event = on_event
        self._changed = threading.Condition()
        self._stopping = False
        self._closed = False
        self._assignment = self._attempt(first_attempt, Action.HOLD)
        self._server = _server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="coordinator", daemon=True).start()

    @property
    def attempt(self) -> int:
        return self._assignment.attempt

    def _attempt(self, number: int, action: Action) -> Assignment:
        return Assignment(
            attempt=number, action=action, procs_per_node=self._procs, master_address="127.0.0.1",
            master_port=_free_port(), grace_seconds=self._grace,
        )  # fmt: skip

    def request_stop(self) -> None:
        """Save and stop."""
        self._act(Action.SAVE_AND_STOP)

    @property
    def saved(self) -> bool:
        """Whether the ranks saved and ended by themselves: at the end of a session of `anytime`."""
        report = self.view.report
        if report is None or self._stopping or report.attempt != self._assignment.attempt:
            return False
        codes = {rank.exit for rank in report.ranks}
        return report.state is AgentState.EXITED and report.failure is None and codes == {ExitCode.SAVED_AND_STOPPED}

    def next_session(self) -> None:
        """Starts the ranks again in a new attempt."""
        with self._changed:
            if self.saved:
                self._assignment = self._attempt(self._assignment.attempt + 1, Action.HOLD)
                self._changed.notify_all()

    def request_kill(self) -> None:
        self._act(Action.STOP)

    def _act(self, action: Action) -> None:
        with self._changed:
            self._stopping = True
            now = self._assignment
            self._assignment = Assignment(**{**vars(now), "action": action})
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, report: Report, wait: float) -> Assignment:
        """Takes the report in; waits up to `wait` seconds while the agent holds the current assignment."""
        events: list[str] = []
        with self._changed:
            self._take_in(report, events)
            until = time.monotonic() + wait
            while not self._closed and self._assignment.tag == report.holding:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            assignment = self._assignment
        for event in events:
            self._on_event(event)
        return assignment

    def _take_in(self, report: Report, events: list[str]) -> None:
        view = self.view
        for name, reading in report.energy.items():
            view.energy[name] = (reading.joules, reading.source)
        if report.attempt != self._assignment.attempt:
            return
        view.report = report
        view.pids.update(rank.pid for rank in report.ranks if rank.pid)
        if report.checkpoint is not None:
            view.checkpoint = report.checkpoint
        if self._stopping:
            return
        if report.state is AgentState.WAITING and self._assignment.action is Action.HOLD:
            self._assignment = Assignment(**{**vars(self._assignment), "action": Action.RUN})
            self._changed.notify_all()
        if report.state is AgentState.EXITED and report.failure is not None:
            self._judge(report, report.failure, events)
        if report.progress is not None:
            view.best_step = max(view.best_step, report.progress.step)

    def _judge(self, report: Report, failure: Failure, events: list[str]) -> None:
        view = self.view
        if view.failures and view.failures[-1].attempt == report.attempt:
            return  # judged already
        # Steps repeated from the last checkpoint are no progress: only what goes beyond every earlier attempt is.
        step = max(report.progress.step if report.progress else 0, view.best_step)
        view.verdict = decide(failure, step, view.failures, self._max_restarts)
        view.failures.append(Restart(failure, report.attempt, step))
        if view.verdict.restart:
            events.append(f"{_cause(failure)}; starting again ({view.verdict.reason})")
            self._assignment = self._attempt(report.attempt + 1, Action.HOLD)
        else:
            events.append(f"{_cause(failure)}; giving up ({view.verdict.reason})")
            self._assignment = Assignment(**{**vars(self._assignment), "action": Action.STOP})
        self._changed.notify_all()


def _cause(failure: Failure) -> str:
    return failure.message if failure.cause is Cause.UNKNOWN else f"{failure.cause.value}: {failure.message}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server(coordinator: LocalCoordinator) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            given = self.headers.get("Authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {coordinator.token}".encode()):
                self._send(401, b"token refused\n")
                return
            try:
                length = min(int(self.headers.get("Content-Length", "0")), MAX_BODY)
                report = Report.from_json(json.loads(self.rfile.read(length)))
                wait = float(parse_qs(urlsplit(self.path).query).get("wait", ["0"])[0])
            except (ValueError, ProtocolError) as error:
                self._send(400, f"{error}\n".encode())
                return
            self._send(200, json.dumps(coordinator.answer(report, min(wait, 60.0)).to_json()).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # the agent hung up; it asks again or has ended

    return Server(("127.0.0.1", 0), Handler)
