"""Ranks' output: a bounded file per rank, one merged stream, and the tail for diagnosis."""

from __future__ import annotations

import collections
import os
import queue
import sys
import threading
import time
from typing import BinaryIO, Deque, List, Optional

from trireme_agent.lines import Lines

MAX_LINE = 16 * 1024
"""Bytes; longer lines are cut into pieces of this size."""
FILE_BYTES = 32 * 1024 * 1024
"""A rank's file is rotated to `.1` at this size: at most twice this per rank on disk."""
TAIL_LINES = 400
PROGRESS_BAR_SECONDS = 5.0
"""A line rewritten in place (carriage return, as progress bars do) is shown this often."""


class Stream:
    """The merged stream. A writer thread of its own, so that whoever reads it slowly never stops the supervisor."""

    def __init__(self, out: Optional[BinaryIO] = None, depth: int = 10_000, lines: Optional[Lines] = None) -> None:
        self.lines = lines or Lines()
        self._out = out if out is not None else sys.stdout.buffer
        self._queue: "queue.Queue[Optional[bytes]]" = queue.Queue(depth)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log-stream", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """A line of the agent itself."""
        self.put(self.lines.agent(text), wait=0.0)

    def put(self, line: bytes, wait: float = 5.0) -> None:
        try:
            self._queue.put(line, block=wait > 0, timeout=wait or None)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout: float = 2.0) -> None:
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _write(self) -> None:
        while True:
            line = self._queue.get()
            try:
                if line is not None:
                    if self._dropped:
                        dropped, self._dropped = self._dropped, 0
                        self._out.write(self.lines.agent(f"stream too slow: {dropped} lines only in the rank files"))
                    self._out.write(line)
                if line is None or self._queue.empty():
                    self._out.flush()
            except (OSError, ValueError):
                pass  # nobody reads any more; the rank files still hold everything
            if line is None:
                return


class RotatingFile:
    """Appends; at `limit` bytes the file becomes `.1` and a new one starts. A full disk never stops a rank."""

    def __init__(self, path: str, limit: int = FILE_BYTES) -> None:
        self.path = path
        self._limit = limit
        self._file: Optional[BinaryIO] = None
        self._size = 0
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._open()
        except OSError:
            self._file = None

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            if self._size and self._size + len(data) > self._limit:
                self._file.close()
                os.replace(self.path, self.path + ".1")
                self._open()
            self._file.write(data)
            self._size += len(data)
        except OSError:
            pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class RankLog:
    """Reads one rank's output from a pipe until every holder of its write end is gone."""

    def __init__(self, rank: int, attempt: int, pipe: int, stream: Stream, log_dir: str) -> None:
        self.rank = rank
        self._attempt = attempt
        self._pipe = pipe
        self._stream = stream
        self._file = RotatingFile(os.path.join(log_dir, f"rank-{rank}.log"))
        self._file.write(b"--- attempt %d ---\n" % attempt)
        self._tail: Deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._tail_lock = threading.Lock()
        self._bar_shown = 0.0
        self._done = threading.Event()
        threading.Thread(target=self._read, name=f"log-rank-{rank}", daemon=True).start()

    def tail(self, settle: float = 0.0) -> List[str]:
        """The last lines. Waits up to `settle` seconds for the end of the output."""
        self._done.wait(settle)
        with self._tail_lock:
            return list(self._tail)

    def _read(self) -> None:
        pending = b""
        try:
            while True:
                try:
                    chunk = os.read(self._pipe, 65536)
                except OSError:
                    break
                if not chunk:
                    break
                self._file.write(chunk)
                pending = self._lines(pending + chunk)
            if pending:
                self._line(pending.rpartition(b"\r")[2] or pending)
        finally:
            os.close(self._pipe)
            self._file.close()
            self._done.set()

    def _lines(self, data: bytes) -> bytes:
        """Hands on whole lines; returns the unfinished rest."""
        *whole, rest = data.split(b"\n")
        for line in whole:
            self._line(line.rstrip(b"\r").rpartition(b"\r")[2])
        if b"\r" in rest:
            shown, _, last = rest.rstrip(b"\r").rpartition(b"\r")
            now = time.monotonic()
            if now - self._bar_shown >= PROGRESS_BAR_SECONDS:
                self._bar_shown = now
                self._line(shown.rpartition(b"\r")[2] or last)
            rest = last + (b"\r" if rest.endswith(b"\r") else b"")
        while len(rest) > MAX_LINE:
            self._line(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        return rest

    def _line(self, line: bytes) -> None:
        for start in range(0, len(line) or 1, MAX_LINE):
            piece = line[start : start + MAX_LINE]
            with self._tail_lock:
                self._tail.append(piece.decode("utf-8", "replace"))
            self._stream.put(self._stream.lines.rank(self.rank, self._attempt, piece))
