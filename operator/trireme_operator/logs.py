"""Logs as text for people or as one JSON object a line."""

from __future__ import annotations

import logging
import sys

from trireme_api.logs import JsonFormatter as JsonFormatter
from trireme_api.logs import extras

from trireme_operator.decide.clock import stamp


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        given = "".join(f" {name}={value}" for name, value in extras(record).items())
        # A message may carry text from a pod: one record stays one line.
        message = record.getMessage().replace("\n", "\\n")
        text = f"{stamp(record.created)} {record.levelname:<7} {record.name}: {message}{given}"
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
