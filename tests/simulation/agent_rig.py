"""A real agent against an HTTPS coordinator stub: answers what the test assigns, keeps what the agent reports."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from trireme_agent import bundle
from trireme_api.protocol import Action, AgentState, Assignment, Env, Report

TOKEN = "the-token"
RIG = "AGENT_RIG"
"""In the environment of an agent and, by inheritance, of all that its ranks start: the rig that is to end them."""


def self_signed(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) for 127.0.0.1; the certificate is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / "ca.pem", folder / "key.pem"
    cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_path, key_path


@dataclass
class Heard:
    report: Report
    at: float
    wait: int
    token: str


@dataclass
class CoordinatorStub:
    """One pod's coordinator. `assign` is what the next answer says; `stop`/`start` make it go away and come back."""

    folder: Path
    heard: list[Heard] = field(default_factory=list)
    status: int = 200
    accepted_token: str = TOKEN

    def __post_init__(self) -> None:
        self.cert, self._key = self_signed(self.folder)
        self._changed = threading.Condition()
        self._assignment: Assignment | None = None
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                wait = int(parse_qs(urlsplit(self.path).query)["wait"][0])
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, body = stub._answer(data, wait, token)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            open_requests: list = []  # noqa: RUF012

            def process_request(self, request, client_address):  # type: ignore[no-untyped-def]
                self.open_requests.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request, client_address):  # type: ignore[no-untyped-def]
                if not isinstance(sys.exc_info()[1], OSError):  # a cut connection is part of the tests
                    super().handle_error(request, client_address)

        server = Server(("127.0.0.1", self.port), Handler)
        server.open_requests = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self._key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = server.server_address[1]
        self._server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """As if the machine it runs on had gone: no port, and open connections cut."""
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        for request in server.open_requests:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        with self._changed:
            self._changed.notify_all()

    def assign(self, assignment: Assignment) -> None:
        with self._changed:
            self._assignment = assignment
            self._changed.notify_all()

    def _answer(self, data: bytes, wait: int, token: str) -> tuple[int, bytes]:
        if token != self.accepted_token:
            return 401, b"token refused\n"
        report = Report.from_json(json.loads(data))
        server = self._server
        with self._changed:
            self.heard.append(Heard(report, time.monotonic(), wait, token))
            self._changed.notify_all()
            until = time.monotonic() + wait
            while self._server is server and wait and self.status == 200:
                if self._assignment is not None and self._assignment.tag != report.holding:
                    break
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self.status != 200:
                return self.status, b"no\n"
            body = json.dumps(self._assignment.to_json() if self._assignment else None).encode()
            return 200, body

    def wait_for(self, condition: Callable[[Report], bool], timeout: float = 10.0, since: int = 0) -> Heard:
        """The first report, from number `since` on, that meets the condition."""
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                for heard in self.heard[since:]:
                    if condition(heard.report):
                        return heard
                left = until - time.monotonic()
                assert left > 0, f"no such report within {timeout} s; the last: {self.heard[-1:]}"
                self._changed.wait(left)


@dataclass
class Agent:
    process: subprocess.Popen[bytes]
    lines: list[str]
    folder: Path
    reader: threading.Thread

    def wait(self, timeout: float = 15.0) -> int:
        code = self.process.wait(timeout)
        self.reader.join(5)
        return code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, text: str, timeout: float = 10.0) -> str:
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            for line in list(self.lines):
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{text!r} not in the output:\n{self.output}")

    def termination(self) -> dict:
        return json.loads((self.folder / "termination-log").read_text())


class Rig:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stub = CoordinatorStub(folder)
        self.agents: list[Agent] = []
        self.bundle = folder / "agent.pyz"
        assert bundle.main([str(self.bundle)]) == 0
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN + "\n")

    def agent(
        self, *command: str, python: str = sys.executable, wrapper: tuple[str, ...] = (), **extra: str
    ) -> Agent:
        """Starts the zipapp, as an image would, with `command` as every rank."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            Env.JOB: "job",
            Env.NAMESPACE: "default",
            Env.POD: "job-0-0",
            Env.POD_UID: "uid-0",
            Env.COORDINATOR: self.stub.url,
            Env.COORDINATOR_CA: str(self.stub.cert),
            Env.TOKEN_FILE: str(self.token_file),
            Env.HEARTBEAT_DIR: str(self.folder / "run"),
            Env.LOG_DIR: str(self.folder / "logs"),
            Env.TERMINATION_LOG: str(self.folder / "termination-log"),
            Env.AGENT_METRICS_PORT: "off",
            RIG: str(self.folder),
            **extra,
        }
        process = subprocess.Popen(
            [*wrapper, python, str(self.bundle), "--", *command], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )
        lines: list[str] = []
        assert process.stdout is not None
        out = process.stdout
        reader = threading.Thread(target=lambda: lines.extend(_each(out, lines)), daemon=True)
        reader.start()
        agent = Agent(process, lines, self.folder, reader)
        self.agents.append(agent)
        return agent

    def script(self, text: str, *arguments: str) -> list[str]:
        """A rank's command: this Python running `text`."""
        path = self.folder / f"script-{len(list(self.folder.glob('script-*')))}.py"
        path.write_text(text)
        return [sys.executable, "-u", str(path), *arguments]

    def assign(self, attempt: int = 1, action: Action = Action.RUN, **fields: object) -> Assignment:
        values: dict = {"procs_per_node": 2, "master_address": "127.0.0.1", "master_port": 29400 + attempt, **fields}
        assignment = Assignment(attempt=attempt, action=action, **values)
        self.stub.assign(assignment)
        return assignment

    def running(self, attempt: int = 1) -> Heard:
        return self.stub.wait_for(lambda r: r.attempt == attempt and r.state is AgentState.RUNNING)

    def close(self) -> None:
        """Ends all that was started here, whatever the test left and whoever its parent is by now."""
        if self.stub._server is not None:
            self.stub.stop()
        until = time.monotonic() + 10.0
        while left := self.started():
            assert time.monotonic() < until, f"processes {left} do not end"
            # Agents too: the first to go must not start anything in answer to the end of its ranks.
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for agent in self.agents:
            agent.process.wait(5)
            agent.reader.join(5)

    def started(self) -> list[int]:
        """Every live process that an agent of this rig is or has started, directly or not."""
        mark = f"{RIG}={self.folder}".encode()
        found = {agent.process.pid for agent in self.agents if agent.process.poll() is None}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.add(int(path.parent.name))
        return sorted(pid for pid in found if alive(pid))


def _each(out, lines: list[str]) -> Iterator[str]:  # type: ignore[no-untyped-def]
    for line in out:
        lines.append(line.decode("utf-8", "replace").rstrip("\n"))
    return iter(())


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
