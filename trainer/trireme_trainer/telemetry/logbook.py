"""The step log: one JSON line per optimiser step and per event, beside the checkpoints, appended to by every attempt.

Rows after the step an attempt resumed from stay: they carry the attempt they belong to, and the newest attempt's row of
a step is the one that counts. Only global rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trireme_trainer.storage import is_local, open_filesystem, resolve_path

log = logging.getLogger(__name__)
NAME = "metrics.jsonl"


class Logbook:
    """`directory`: where `metrics.jsonl` lies; None: nothing is kept.

    A local or mounted directory gets one growing file. Object stores cannot append, so there each `flush` writes what
    came since the last one as `metrics.attempt-A.part-N.jsonl`. A log that cannot be written never ends training.
    """

    def __init__(self, directory: str | None, attempt: int) -> None:
        self._attempt = attempt
        self._file: IO[str] | None = None
        self._remote: str | None = None
        self._rows: list[str] = []
        self._parts = 0
        if directory is None:
            return
        if is_local(directory):
            path = Path(resolve_path(directory)) / NAME
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _end_torn_line(path)
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                log.warning("no step log: %s: %s", path, error.strerror)
        else:
            self._remote = f"{directory.rstrip('/')}/metrics.attempt-{attempt}"

    def step(self, **fields: Any) -> None:
        self._write(fields)

    def event(self, name: str, **fields: Any) -> None:
        self._write({"event": name, **fields})

    def flush(self) -> None:
        """Makes what was written so far visible: to object stores only now, to files it already is."""
        if self._remote is None or not self._rows:
            return
        try:
            filesystem, path = open_filesystem(f"{self._remote}.part-{self._parts:06d}.jsonl")
            with filesystem.open(path, "w") as file:
                file.write("".join(self._rows))
            self._rows.clear()
            self._parts += 1
        except Exception as error:  # whatever a storage driver may raise; the rows go with the next part
            log.warning("step log not written: %s: %s", self._remote, error)

    def close(self) -> None:
        self.flush()
        if self._file:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, fields: dict[str, Any]) -> None:
        row = json.dumps({**fields, "attempt": self._attempt, "time": round(time.time(), 3)}, allow_nan=False) + "\n"
        if self._remote is not None:
            self._rows.append(row)
        if self._file:
            with suppress(OSError):
                self._file.write(row)


def _end_torn_line(path: Path) -> None:
    """A killed attempt may have left half a line; the next row must not be glued to it."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
