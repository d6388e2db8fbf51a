"""Ranks of one run as processes of this machine, on loopback, as the agent starts them; and the machine in words."""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RUN_SECONDS = 1800
"""A run that takes longer has failed."""


def train(recipe: dict[str, Any], work: Path, ranks: int = 1) -> dict[str, Any]:
    """Trains `recipe` with the trainer. Returns {"losses", "rows", "ended"}; exits where it fails."""
    launch([sys.executable, "-m", "trireme_trainer"], recipe, work, ranks)
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "rows": [row for row in rows if "loss" in row],
        "ended": next(row for row in rows if row.get("event") == "ended"),
    }


def launch(command: list[str], recipe: dict[str, Any], work: Path, ranks: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = dict.fromkeys(("TRIREME_LOG_DIR", "TRIREME_HEARTBEAT_DIR"), str(work))
    common = {**os.environ, **places, "TRIREME_RECIPE": json.dumps(recipe), "OMP_WAIT_POLICY": "PASSIVE"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common.setdefault("OMP_NUM_THREADS", "1")
    started: list[subprocess.Popen[bytes]] = []
    for number in range(ranks):
        env = {**common, "RANK": str(number), "LOCAL_RANK": str(number)}
        with (work / f"rank-{number}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    codes: list[int | None]
    try:
        codes = [rank.wait(RUN_SECONDS) for rank in started]
    except subprocess.TimeoutExpired:
        codes = [rank.poll() for rank in started]
        for rank in started:
            rank.kill()
            rank.wait()
    if codes != [0] * ranks:
        tail = "\n".join((work / f"rank-{i}.log").read_text()[-3000:] for i, code in enumerate(codes) if code != 0)
        sys.exit(f"{' '.join(command[:3])} ended with {codes}\n{tail}")


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loadAverage": round(os.getloadavg()[0], 2),
    }
