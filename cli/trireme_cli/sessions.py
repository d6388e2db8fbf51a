"""What `trireme run` keeps of its sessions for a later report: one JSON line when one begins, one when it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trireme_api.protocol import Cause

NAME = "sessions.jsonl"


@dataclass
class Session:
    """One call of `trireme run`; a second in the same directory goes on from the first."""

    attempt: int
    """The first of its attempts."""
    began: float
    plan: Mapping[str, Any] = field(default_factory=dict)
    """name, nproc, command, checkpoint, recipe"""
    ended: float | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    """As `trireme run --json` prints it; empty while it runs, or after it was killed."""


def begin(directory: Path, attempt: int, plan: Mapping[str, Any]) -> None:
    _append(directory, {"attempt": attempt, "began": round(time.time(), 3), "plan": plan})


def end(directory: Path, attempt: int, result: Mapping[str, Any]) -> None:
    _append(directory, {"attempt": attempt, "ended": round(time.time(), 3), "result": result})


def read(directory: Path) -> list[Session]:
    """By begin; lines that are torn are left out. Raises OSError where there is no such file."""
    found: dict[int, Session] = {}
    for line in (directory / NAME).read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            data = json.loads(line)
            if "began" in data:
                found[data["attempt"]] = Session(data["attempt"], float(data["began"]), data["plan"])
            elif data["attempt"] in found:
                session = found[data["attempt"]]
                session.ended, session.result = float(data["ended"]), data["result"]
    return sorted(found.values(), key=lambda session: session.began)


def _append(directory: Path, line: Mapping[str, Any]) -> None:
    with (directory / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def why(failure: Mapping[str, Any]) -> str:
    """Of a failure as a session's result has it; that nobody knows the cause is no news beside the message."""
    cause, message = str(failure["cause"]), str(failure["message"])
    return message if cause == Cause.UNKNOWN.value else f"{cause}: {message}"
