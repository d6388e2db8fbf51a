"""One port of this machine's loopback, carried to the API server inside the control namespace.

A socket belongs to the namespace it was made in: so listen first, enter the control namespace, then connect
from there. Runs as a program of its own: `forwarder.py PORT NAMESPACE_FILE ADDRESS PORT`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading

CLONE_NEWNET = 0x40000000
CHUNK = 1 << 18


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the end of the stream, then pass the end on; the other direction goes on by itself."""
    try:
        while True:
            data = source.recv(CHUNK)
            if not data:
                break
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def serve(client: socket.socket, address: str, port: int) -> None:
    with client:
        try:
            server = socket.create_connection((address, port), timeout=10)
        except OSError:
            return
        with server:
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=pump, args=(server, client), daemon=True)
            back.start()
            pump(client, server)
            back.join()


def main() -> None:
    port, namespace, address, target = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    listener = socket.socket()
    # A port that was in use a moment ago (a restart) may be bound again.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(512)
    descriptor = os.open(namespace, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        sys.exit(f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
    os.close(descriptor)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client, address, target), daemon=True).start()


if __name__ == "__main__":
    main()
