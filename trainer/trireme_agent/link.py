"""The line to the coordinator: one thread long-polls for assignments, another tells news at once.

Two connections, because a long poll carries the report as it was when it began: a crash must not wait for it to end.
When nobody answers, both keep trying with growing pauses, and training goes on. News is tried once without a pause.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
import time
from typing import Callable, Dict, Optional
from urllib.parse import quote, urlsplit

from trireme_api.protocol import REPORT_PATH, Assignment, ProtocolError, Report

from trireme_agent.backoff import Backoff, Unreachable
from trireme_agent.settings import BadSettings, Settings

POLL_SECONDS = 30
CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 10.0
"""On top of the seconds asked for in `wait`."""
AWAY_SECONDS = 2.0
MAX_ANSWER = 1024 * 1024
MAX_RETRY_AFTER = 60.0


def tls_context(ca: Optional[str]) -> ssl.SSLContext:
    """Trusts only the given CA (a path or PEM text). Raises BadSettings."""
    try:
        if ca is None:
            return ssl.create_default_context()
        if "-----BEGIN" in ca:
            return ssl.create_default_context(cadata=ca)
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise BadSettings(f"TRIREME_COORDINATOR_CA is neither a readable PEM file nor PEM text: {error}") from None


class Client:
    """One keep-alive connection; used by one thread."""

    def __init__(self, settings: Settings) -> None:
        url = urlsplit(settings.coordinator)
        assert url.hostname
        self._secure = url.scheme == "https"
        self._host, self._port = url.hostname, url.port or (443 if self._secure else 80)
        names = {"namespace": settings.namespace, "name": settings.job, "pod": settings.pod}
        self._path = url.path.rstrip("/") + REPORT_PATH.format(**{k: quote(v, safe="") for k, v in names.items()})
        self._ca = settings.coordinator_ca
        if self._secure:
            tls_context(self._ca)
        self._token_file = settings.token_file
        self._connection: Optional[http.client.HTTPConnection] = None

    def report(self, report: Report, wait: int, news: bool = False) -> Optional[Assignment]:
        """Sends the report; returns the assignment, or None while there is none for this pod. Raises Unreachable.

        A coordinator that has too much to do hears `news` first."""
        query = f"wait={wait}&news=1" if news else f"wait={wait}"
        body = json.dumps(report.to_json(), separators=(",", ":")).encode()
        reused = self._connection is not None
        try:
            try:
                return self._exchange(body, wait, query)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                # The other side may close an idle connection at any time; only then is a second try free of delay.
                self.close()
                if not reused:
                    raise
                return self._exchange(body, wait, query)
        except socket.timeout:
            self.close()
            raise Unreachable("no answer in time", slow=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Unreachable(f"{type(error).__name__}: {error}") from None

    def _exchange(self, body: bytes, wait: int, query: str) -> Optional[Assignment]:
        connection = self._connect()
        if connection.sock is not None:
            connection.sock.settimeout(wait + ANSWER_TIMEOUT)
        connection.request("POST", f"{self._path}?{query}", body=body, headers=self._headers())
        response = connection.getresponse()
        data = response.read(MAX_ANSWER)
        if connection.sock is None or not response.isclosed():
            self.close()  # the other side asks for it, or has more to say than can be meant
        if response.status == 204:
            return None
        if response.status != 200:
            words = data[:200].decode("utf-8", "replace").strip().splitlines()
            said = f"HTTP {response.status} {words[0] if words else response.reason}"
            raise Unreachable(said, stay_away=_seconds(response.getheader("Retry-After")))
        try:
            answer = json.loads(data)
            return None if answer is None else Assignment.from_json(answer)
        except (ValueError, ProtocolError) as error:
            raise Unreachable(f"answer not understood: {error}") from None

    def _headers(self) -> Dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._token_file:
            # Read each time: the kubelet replaces a projected token well before it expires.
            with open(self._token_file, encoding="ascii") as file:
                headers["Authorization"] = f"Bearer {file.read().strip()}"
        return headers

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is not None:
            return self._connection
        if self._secure:
            # A new context each time: the CA file is replaced when the CA is renewed.
            context = tls_context(self._ca)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_TIMEOUT, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
        except socket.timeout:
            # Without a TCP connection the machine is gone; with one, whoever should greet us has no time.
            slow = connection.sock is not None
            connection.close()
            raise Unreachable("no answer in time" if slow else "no connection in time", slow=slow) from None
        if connection.sock is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _seconds(text: Optional[str]) -> Optional[float]:
    """Of a Retry-After header; None where it has none that can be obeyed."""
    return min(float(text), MAX_RETRY_AFTER) if text is not None and text.strip().isdigit() else None


class Link:
    def __init__(
        self, settings: Settings, deliver: Callable[[Assignment], None], say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._deliver = deliver
        self._say = say
        self._clock = clock
        self._changed = threading.Condition()
        self._report: Optional[Report] = None
        self._serial = 0
        self._urgent = 0
        self._delivered = 0
        self._regular = False
        self._holding: Optional[str] = None
        self._last_contact = clock()
        self._away: Optional[float] = None
        self._closed = threading.Event()
        self._poll_client, self._push_client = Client(settings), Client(settings)

    def start(self) -> None:
        for name, run in (("poll", self._poll), ("push", self._push)):
            threading.Thread(target=run, name=f"coordinator-{name}", daemon=True).start()

    def publish(self, report: Report, urgent: bool, regular: bool) -> None:
        """The newest state. Urgent: sent at once. Regular: this pod tells its progress every few seconds."""
        with self._changed:
            self._report = report
            self._serial += 1
            self._regular = regular
            if urgent:
                self._urgent = self._serial
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Waits until the coordinator has the newest report; False when it could not be reached in time."""
        until = self._clock() + timeout
        with self._changed:
            wanted = self._serial
            self._urgent = wanted
            self._changed.notify_all()
            while self._delivered < wanted:
                left = until - self._clock()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def unheard(self) -> float:
        """Seconds since the coordinator last answered."""
        return self._clock() - self._last_contact

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _send(self, client: Client, wait: int, news: bool = False) -> Optional[Assignment]:
        with self._changed:
            report, serial = self._report, self._serial
            assert report is not None
            report.holding = self._holding
        assignment = client.report(report, wait, news)
        with self._changed:
            self._delivered = max(self._delivered, serial)
            self._last_contact = self._clock()
            if self._away is not None:
                self._say(f"coordinator is back after {self._clock() - self._away:.0f} s")
                self._away = None
            if assignment is not None:
                self._holding = assignment.tag
            self._changed.notify_all()
        if assignment is not None:
            self._deliver(assignment)
        return assignment

    def _failed(self, error: Unreachable) -> None:
        with self._changed:
            # One of several replicas may refuse for a moment while another answers: that is not worth a line.
            if self._away is None and self.unheard() >= AWAY_SECONDS and not self._closed.is_set():
                self._away = self._last_contact
                self._say(f"coordinator does not answer ({error}); ranks go on, trying again")

    def _wait_for_report(self) -> None:
        with self._changed:
            while self._report is None and not self._closed.is_set():
                self._changed.wait()

    def _poll(self) -> None:
        self._wait_for_report()
        backoff = Backoff()
        while not self._closed.is_set():
            began, before = self._clock(), self._holding
            try:
                self._send(self._poll_client, POLL_SECONDS)
            except Unreachable as error:
                self._failed(error)
                self._closed.wait(backoff.after(error))
                continue
            if self._holding == before and self._clock() - began < 0.5:
                # A coordinator that answers long polls at once, with nothing new, must not be asked in a tight loop.
                self._closed.wait(backoff.after())
            else:
                backoff.reset()

    def _push(self) -> None:
        self._wait_for_report()
        backoff = Backoff()
        due = self._clock() + self._settings.report_seconds
        while not self._closed.is_set():
            with self._changed:
                while not self._closed.is_set() and self._urgent <= self._delivered:
                    left = due - self._clock()
                    if left <= 0 and self._regular and self._serial > self._delivered:
                        break
                    self._changed.wait(left if left > 0 and self._regular else None)
                tried = self._urgent
                news = tried > self._delivered
            if self._closed.is_set():
                break
            try:
                self._send(self._push_client, 0, news)
            except Unreachable as error:
                self._failed(error)
                if self._news_within(backoff.after(error), tried):
                    backoff.reset()
            else:
                backoff.reset()
                due = self._clock() + self._settings.report_seconds

    def _news_within(self, seconds: float, tried: int) -> bool:
        """Waits so long, or until there is newer news than was tried; whether there is."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._urgent > tried, seconds)
            return self._urgent > tried


def token_readable(settings: Settings) -> None:
    """Raises BadSettings when the token file cannot be read."""
    if settings.token_file and not os.access(settings.token_file, os.R_OK):
        raise BadSettings(f"TRIREME_TOKEN_FILE={settings.token_file!r} cannot be read; mount the projected token there")
