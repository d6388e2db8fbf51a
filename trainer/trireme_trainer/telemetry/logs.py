"""This process's log: text, or with TRIREME_LOG_FORMAT=json one object a line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TextIO

from trireme_api.logs import JsonFormatter
from trireme_api.protocol import Env

from trireme_trainer.telemetry.heartbeat import Pulse


def log_to(stream: TextIO, env: Mapping[str, str], pulse: Pulse) -> None:
    """Rank 0 tells how it goes, the others what is wrong. `pulse` knows the step."""
    rank = env.get(Env.RANK, "0")
    handler = logging.StreamHandler(stream)
    if env.get(Env.LOG_FORMAT) == "json":
        known = {"namespace": env.get(Env.NAMESPACE), "job": env.get(Env.JOB)}
        numbers = {"attempt": env.get(Env.ATTEMPT, ""), "rank": rank}
        fixed: dict[str, Any] = {name: text for name, text in known.items() if text}
        fixed |= {name: int(text) for name, text in numbers.items() if text.isdigit()}
        handler.setFormatter(JsonFormatter(lambda: {**fixed, "step": pulse.step}))
    else:
        text = f"%(asctime)s rank {rank} %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(text, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if rank == "0" else logging.WARNING)
