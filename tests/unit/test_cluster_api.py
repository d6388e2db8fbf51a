"""The thin client of the local cluster, towards a server that dies while it answers."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from localcluster.api import Api
from trireme_operator.serve.certificates import make_authority

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.contextmanager
def answering(folder: Path, answer: bytes) -> Iterator[Api]:
    """A server that sends `answer` to whoever asks first, and is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        authority = base64.b64encode(make_authority(datetime.now(UTC)).pem.encode()).decode()
        server = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = {
            "clusters": [{"cluster": {"server": server, "certificate-authority-data": authority}}],
            "users": [{"user": {"token": "t"}}],
        }
        (folder / "kubeconfig").write_text(json.dumps(config))
        yield Api(folder / "kubeconfig")
        thread.join(5)


def test_a_whole_answer_is_decoded(tmp_path: Path) -> None:
    with answering(tmp_path, HEAD + b'c\r\n{"items":[]}\r\n0\r\n\r\n') as api:
        assert api.request("GET", "/x") == {"items": []}


@pytest.mark.parametrize("answer", [HEAD + b'ff\r\n{"items":', HEAD, b"HTTP/1.1 2", b""])
def test_half_an_answer_is_a_broken_connection(tmp_path: Path, answer: bytes) -> None:
    with answering(tmp_path, answer) as api, pytest.raises(OSError):
        api.request("GET", "/x")


def test_a_server_that_dies_is_not_ready(tmp_path: Path) -> None:
    with answering(tmp_path, HEAD + b"ff\r\nok") as api:
        assert not api.ready()
