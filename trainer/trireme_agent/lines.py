"""The merged stream's lines: text for people, `[rank 3] …` and `[agent] …`, or one JSON object each."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any, Dict


class Lines:
    """As text."""

    attempt = 0
    """Of the ranks that run, or ran last."""

    def agent(self, text: str) -> bytes:
        """What the agent itself says, a line each."""
        return "".join(f"[agent] {line}\n" for line in text.splitlines()).encode("utf-8", "replace")

    def rank(self, rank: int, attempt: int, line: bytes) -> bytes:
        return b"[rank %d] %s\n" % (rank, line)


class JsonLines(Lines):
    """A rank's line that is a JSON object already keeps what it says; whatever else is its `message`."""

    def __init__(self, namespace: str, job: str) -> None:
        self._job = {"namespace": namespace, "job": job}

    def agent(self, text: str) -> bytes:
        return b"".join(
            self._line("trireme_agent", line, {"attempt": self.attempt} if self.attempt else {})
            for line in text.splitlines()
        )

    def rank(self, rank: int, attempt: int, line: bytes) -> bytes:
        where = {"attempt": attempt, "rank": rank}
        said = _object(line)
        if said is not None:
            return self._dump({**self._job, **where, **said})
        return self._line("rank", line.decode("utf-8", "replace"), where)

    def _line(self, logger: str, message: str, where: Dict[str, Any]) -> bytes:
        moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {"time": moment, "level": "info", "logger": logger, "message": message}
        return self._dump({**said, **self._job, **where})

    @staticmethod
    def _dump(line: Dict[str, Any]) -> bytes:
        return json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _object(line: bytes) -> Any:
    if not line.startswith(b"{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "message" in found else None
