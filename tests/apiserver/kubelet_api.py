"""The part of a kubelet that answers for pods' output: `logs` and `exec` go through the real API server to this.

Output is that of the processes of `KubeletStandIn`; a command runs as a process of this machine, with the claims' mount
point put where the stand-in has it.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from localcluster import credentials
from localcluster.api import Api
from rig import MERGE, KubeletStandIn
from trireme_api.protocol import PVC_ROOT

STDOUT, STDERR, STATUS = 1, 2, 3
"""Channels of the protocol v4.channel.k8s.io."""


class KubeletApi:
    def __init__(self, standin: KubeletStandIn, folder: Path) -> None:
        self.standin = standin
        pki = folder / "kubelet-pki"
        credentials.make_authority(pki)
        credentials.make_certificate(pki, "kubelet", "/CN=kubelet", addresses=["127.0.0.1"], names=["localhost"])
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                _, verb, _, pod, _ = url.path.split("/", 4)
                query = parse_qs(url.query)
                if verb == "containerLogs":
                    outer.log(self, pod, query)
                else:
                    outer.execute(self, query["command"])

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki / "kubelet.crt", pki / "kubelet.key")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def __enter__(self) -> KubeletApi:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def serve(self, api: Api, nodes: tuple[str, ...]) -> None:
        """The API server finds it as the kubelet of these nodes."""
        address = [{"type": "InternalIP", "address": "127.0.0.1"}]
        endpoint = {"kubeletEndpoint": {"Port": self.server.server_address[1]}}
        status = {"addresses": address, "daemonEndpoints": endpoint}
        for node in nodes:
            api.request("PATCH", f"/api/v1/nodes/{node}/status", {"status": status}, content=MERGE)

    def log(self, request: http.server.BaseHTTPRequestHandler, pod: str, query: dict[str, list[str]]) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "text/plain")
        request.send_header("Connection", "close")
        request.end_headers()
        request.close_connection = True
        for line in self.lines(pod, "true" in query.get("follow", [])):
            request.wfile.write(f"{stamp()} {line}\n".encode())

    def lines(self, pod: str, follow: bool) -> Iterator[str]:
        shown = 0
        while True:
            lines = self.standin.output(pod).splitlines()
            yield from lines[shown:]
            shown = len(lines)
            ended = all(self.standin.processes[u].poll() is not None for u, n in self.standin.names.items() if n == pod)
            if not follow or ended:
                return
            time.sleep(0.1)

    def execute(self, request: http.server.BaseHTTPRequestHandler, command: list[str]) -> None:
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        request.send_response(101)
        request.send_header("Upgrade", "websocket")
        request.send_header("Connection", "Upgrade")
        request.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        request.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
        request.end_headers()
        here = [part.replace(PVC_ROOT, str(self.standin.folder / "pvc")) for part in command]
        here[0] = sys.executable if here[0] == "python3" else here[0]
        done = subprocess.run(here, capture_output=True, check=False)
        for channel, data in ((STDOUT, done.stdout), (STDERR, done.stderr)):
            for start in range(0, len(data), 30_000):
                request.wfile.write(frame(channel, data[start : start + 30_000]))
        causes = {"details": {"causes": [{"reason": "ExitCode", "message": str(done.returncode)}]}}
        status = {"status": "Success"} if done.returncode == 0 else {"status": "Failure", **causes}
        request.wfile.write(frame(STATUS, json.dumps(status).encode()) + b"\x88\x00")
        request.close_connection = True


def frame(channel: int, data: bytes) -> bytes:
    """A WebSocket binary message of the server."""
    body = bytes([channel]) + data
    if len(body) < 126:
        return bytes([0x82, len(body)]) + body
    return bytes([0x82, 126]) + len(body).to_bytes(2, "big") + body


def stamp() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e9):09d}Z"
