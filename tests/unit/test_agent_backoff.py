"""The agent's line to a coordinator that has too much to do: how long it stays away, and what it tells all the same."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from trireme_agent import link
from trireme_agent.backoff import FIRST_PAUSE, LONGEST_PAUSE, LONGEST_WHILE_SLOW, Backoff, Unreachable
from trireme_agent.link import Client, Link
from trireme_agent.settings import Settings, from_environment
from trireme_api.protocol import Action, AgentState, Assignment, Report

AWAY, SLOW = Unreachable("connection refused"), Unreachable("no answer in time", slow=True)


class Stub:
    """Answers with `status`, `headers`; None: not at all. Counts connections and keeps what was asked."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.headers: dict[str, str] = {}
        self.connections, self.asked = 0, []  # type: ignore[var-annotated]
        self.hung = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                stub.connections += 1
                super().setup()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                stub.asked.append((time.monotonic(), self.path.partition("?")[2]))
                if stub.status is None:
                    stub.hung.wait(10)
                    return
                body = json.dumps(Assignment(1, Action.RUN).to_json() if stub.status == 200 else "no").encode()
                self.send_response(stub.status)
                self.send_header("Content-Length", str(len(body)))
                for name, value in stub.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def news(self) -> list[float]:
        return [at for at, query in list(self.asked) if "news=1" in query]


@pytest.fixture
def stub() -> Iterator[Stub]:
    found = Stub()
    yield found
    found.hung.set()
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def settings(stub: Stub, tmp_path: Path) -> Settings:
    return from_environment(
        [],
        {
            "TRIREME_COORDINATOR": f"http://127.0.0.1:{stub.server.server_port}", "TRIREME_JOB": "job",
            "TRIREME_NAMESPACE": "ns", "TRIREME_POD": "job-0-1", "TRIREME_POD_UID": "u",
            "TRIREME_HEARTBEAT_DIR": str(tmp_path),
        },
    )  # fmt: skip


def report() -> Report:
    return Report("u", 1, AgentState.RUNNING)


@pytest.mark.parametrize(("error", "longest"), [(None, 5.0), (AWAY, LONGEST_PAUSE), (SLOW, LONGEST_WHILE_SLOW)])
def test_pauses_grow_to_a_bound_and_begin_anew(error: Unreachable | None, longest: float) -> None:
    backoff = Backoff()
    pauses = [backoff.after(error) for _ in range(12)]
    assert FIRST_PAUSE / 2 <= pauses[0] <= FIRST_PAUSE
    assert all(longest / 2 <= pause <= longest for pause in pauses[6:])
    backoff.reset()
    assert backoff.after(error) <= FIRST_PAUSE


def test_a_slow_coordinator_that_is_gone_then_is_looked_for_soon() -> None:
    backoff = Backoff()
    for _ in range(9):
        backoff.after(SLOW)
    assert backoff.after(AWAY) <= LONGEST_PAUSE


def test_what_the_coordinator_asks_for_is_kept_and_spread() -> None:
    pauses = [Backoff().after(Unreachable("busy", stay_away=10.0)) for _ in range(200)]
    assert min(pauses) >= 10.0
    assert max(pauses) <= 20.0
    assert max(pauses) - min(pauses) > 5.0, "or all would come back together"


@pytest.mark.parametrize(("status", "close"), [(503, False), (404, False), (503, True)])
def test_a_refusal_costs_no_new_connection(stub: Stub, settings: Settings, status: int, close: bool) -> None:
    client = Client(settings)
    stub.status = status
    stub.headers = {"Connection": "close"} if close else {"Retry-After": "7"}
    for _ in range(3):
        with pytest.raises(Unreachable) as caught:
            client.report(report(), 0)
        assert caught.value.stay_away == (None if close else 7.0)
        assert not caught.value.slow
    stub.status = 200
    assert client.report(report(), 0) is not None
    assert stub.connections == (4 if close else 1), "a replica that does not lead sends us to another"


@pytest.mark.parametrize(("text", "seconds"), [("5", 5.0), ("99999", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_an_odd_retry_after(stub: Stub, settings: Settings, text: str, seconds: float | None) -> None:
    stub.status, stub.headers = 429, {"Retry-After": text}
    with pytest.raises(Unreachable) as caught:
        Client(settings).report(report(), 0)
    assert caught.value.stay_away == seconds


def test_an_answer_that_does_not_come_in_time(
    stub: Stub, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ANSWER_TIMEOUT", 0.2)
    stub.status = None
    with pytest.raises(Unreachable) as caught:
        Client(settings).report(report(), 0)
    assert caught.value.slow


def test_a_machine_that_is_gone_is_not_taken_for_one_that_is_busy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    """A pulled cable answers nothing: whoever takes over there is to be found within seconds."""

    def no_answer(*_: object, **__: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", no_answer)
    with pytest.raises(Unreachable) as caught:
        Client(settings).report(report(), 0)
    assert not caught.value.slow


def test_a_greeting_that_does_not_come_in_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(Unreachable) as caught:
            Client(dataclasses.replace(settings, coordinator=f"https://127.0.0.1:{port}")).report(report(), 0)
    assert caught.value.slow


def test_news_is_told_at_once_to_a_coordinator_that_sent_us_away(stub: Stub, settings: Settings) -> None:
    stub.status, stub.headers = 503, {"Retry-After": "30"}
    found = Link(settings, lambda _: None, lambda _: None)
    found.publish(report(), urgent=True, regular=True)
    found.start()
    try:
        time.sleep(1.0)
        assert len(stub.asked) == 2, "each connection once, then both stay away"
        assert len(stub.news()) == 1
        for number in (2, 3):
            at = time.monotonic()
            found.publish(report(), urgent=True, regular=True)
            time.sleep(0.5)
            assert len(stub.news()) == number
            assert stub.news()[-1] - at < 0.3
        found.publish(report(), urgent=False, regular=True)
        time.sleep(0.3)
        assert len(stub.asked) == 4, "figures are no news"
    finally:
        found.close()
