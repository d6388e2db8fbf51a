"""Logs as text for people or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys

from trireme_operator.clock import stamp

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def _extras(record: logging.LogRecord) -> dict[str, str]:
    return {
        name: str(value)
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_") and isinstance(value, str | int | float)
    }


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": stamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items())
        # A message may carry text from a pod: one record stays one line.
        message = record.getMessage().replace("\n", "\\n")
        text = f"{stamp(record.created)} {record.levelname:<7} {record.name}: {message}{extras}"
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def configure(style: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # kopf tells of every object and handler; what matters of it are its troubles.
    for name in ("kopf", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING if level != "debug" else logging.DEBUG)
