"""Log records as one JSON object a line, for operator and trainer; the agent, which imports nothing of this, writes the
same (`trireme_agent.lines`). Fields: time, level, logger, message; namespace, job, attempt, rank, step where they are
known; exception; and what else the record carries."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def extras(record: logging.LogRecord) -> dict[str, str | int | float]:
    """What was given as `extra`."""
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_") and isinstance(value, str | int | float)
    }


def nothing() -> Mapping[str, Any]:
    return {}


class JsonFormatter(logging.Formatter):
    """`fields` is asked at each record: what is known of the process at that moment."""

    def __init__(self, fields: Callable[[], Mapping[str, Any]] = nothing) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields(),
            **extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
