"""Starts gangs of real rank processes on loopback: the same entry point, environment and exit codes as under the agent.

Ranks are forked from one server process that has imported the trainer, so that a case costs seconds, not the import.
`fault` names a function of `faults.py` that the rank calls before training: how a test makes a rank misbehave.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from trireme_api.heartbeat import Heartbeat, heartbeat_name
from trireme_api.protocol import Env

HERE = Path(__file__).resolve().parent
SEQUENCE = 32
SEQUENCES = 12
"""Per step: divides by 1, 2, 3 and 4 ranks."""
WAIT = 120.0

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["trireme_trainer.train", "trireme_trainer.lifecycle.failures"])


def make_corpus(directory: Path) -> Path:
    """Real text (the project's own licence), tokenised: a little over 160 blocks, so that an epoch ends at step 13."""
    from trireme_trainer.data.prepare import Options, prepare

    text = HERE.parent.parent / "LICENSE"
    output = directory / "corpus"
    prepare([str(text)], str(output), Options(vocabulary=384, separator="blank-line", valid_fraction=0.0))
    return output


def make_recipe(corpus: Path, *, steps: int = 6, **changes: Any) -> dict[str, Any]:
    """Two layers, no dropout, fp32. `changes` replace top-level fields."""
    recipe: dict[str, Any] = {
        "model": {"preset": "opt-tiny", "overrides": {"dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": 32}},
        "data": {"sources": [{"path": str(corpus)}], "sequenceLength": SEQUENCE},
        "batch": {"tokens": SEQUENCES * SEQUENCE, "micro": 2},
        "optimizer": {"learningRate": 1e-3},
        "schedule": {"warmupTokens": 4 * SEQUENCES * SEQUENCE},
        "precision": "fp32",
        "until": {"steps": steps},
        "seed": 7,
    }
    return {**recipe, **changes}


@dataclass
class Gang:
    """One attempt: `world` ranks, started at once. Use `wait()` or `run()`; `codes` has the exit codes."""

    root: Path
    """Of this test: checkpoints and heartbeats go in it."""
    recipe: dict[str, Any]
    world: int = 1
    attempt: int = 1
    every: int | str = 3
    keep: int = 3
    checkpoint: bool = True
    memory: dict[str, Any] | None = None
    """`checkpoint.memory`; each node then has a folder of its own, see `pod_memory`."""
    per_node: int = 0
    """Ranks of one pod; 0: all of them."""
    fault: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    ranks: list[ForkServerProcess] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def work(self) -> Path:
        return self.root / f"attempt-{self.attempt}"

    def node(self, rank: int) -> int:
        return rank // (self.per_node or self.world)

    def pod_memory(self, node: int) -> Path:
        """What a pod keeps in memory: outlives the ranks; a test that removes it has lost the pod."""
        return self.root / "memory" / f"node-{node}"

    def beats(self, rank: int) -> Path:
        return self.work / (f"heartbeats-{self.node(rank)}" if self.node(rank) else "heartbeats")

    def start(self) -> Gang:
        self.work.mkdir(parents=True)
        port = free_port()
        per_node = self.per_node or self.world
        for rank in range(self.world):
            env = {
                Env.RANK: str(rank),
                Env.LOCAL_RANK: str(rank % per_node),
                Env.WORLD_SIZE: str(self.world),
                Env.LOCAL_WORLD_SIZE: str(per_node),
                Env.MEMORY_DIR: str(self.pod_memory(self.node(rank))),
                Env.MASTER_ADDR: "127.0.0.1",
                Env.MASTER_PORT: str(port),
                Env.ATTEMPT: str(self.attempt),
                Env.RECIPE: json.dumps(self.recipe),
                Env.HEARTBEAT_DIR: str(self.beats(rank)),
                Env.STOP_FILE: str(self.work / "stop"),
                Env.LOG_DIR: str(self.work),
                Env.COMPILE_BACKEND: "aot_eager",
                "OMP_NUM_THREADS": "1",
                "TRIREME_INIT_TIMEOUT": "60",
                "TRIREME_STEP_TIMEOUT": "60",
                **self.environment,
            }
            if self.checkpoint:
                env[Env.CHECKPOINT] = json.dumps(
                    {"uri": str(self.checkpoints), "everySteps": self.every, "keep": self.keep}
                    | ({"memory": self.memory} if self.memory is not None else {})
                )
            process = _server.Process(target=run_rank, args=(env, str(self.work / f"rank-{rank}.log"), self.fault))
            process.start()
            self.ranks.append(process)
        return self

    def wait(self, seconds: float = WAIT) -> list[int]:
        """Exit codes by rank, negative for signals. A rank that does not end is killed and fails the test."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        for process in self.ranks:
            if process.exitcode is None:
                process.kill()
                process.join()
        assert not stuck, f"ranks {stuck} did not end within {seconds} s:\n{self.logs()}"
        return self.codes

    def run(self, expect: int = 0) -> Gang:
        codes = self.start().wait()
        assert codes == [expect] * self.world, f"exit codes {codes}, expected {expect}:\n{self.logs()}"
        return self

    @property
    def codes(self) -> list[int]:
        return [process.exitcode if process.exitcode is not None else 999 for process in self.ranks]

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.work.glob("rank-*.log")))

    def heartbeat(self, rank: int = 0) -> Heartbeat | None:
        try:
            name = heartbeat_name(rank % (self.per_node or self.world))
            return Heartbeat.from_json(json.loads((self.beats(rank) / name).read_text()))
        except FileNotFoundError:
            return None

    def until_step(self, step: int, seconds: float = WAIT) -> Gang:
        """Waits until rank 0 has done `step` steps."""
        return self.until(lambda beat: beat.step >= step, f"step {step}", seconds)

    def until(self, reached: Any, what: str, seconds: float = WAIT) -> Gang:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            beat = self.heartbeat()
            if beat is not None and reached(beat):
                return self
            assert self.ranks[0].is_alive(), f"rank 0 ended before {what}:\n{self.logs()}"
            time.sleep(0.01)
        raise AssertionError(f"no {what} within {seconds} s:\n{self.logs()}")

    def signal(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        for rank in range(self.world) if ranks is None else ranks:
            pid = self.ranks[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def rows(self) -> list[dict[str, Any]]:
        """The whole step log of this directory, all attempts."""
        path = (self.checkpoints if self.checkpoint else self.work) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row.get("event") == name and row["attempt"] == self.attempt]

    def losses(self) -> dict[int, float]:
        """Loss by step, of this attempt."""
        return {row["step"]: row["loss"] for row in self.rows() if "loss" in row and row["attempt"] == self.attempt}

    def column(self, name: str) -> dict[int, Any]:
        return {row["step"]: row.get(name) for row in self.rows() if "loss" in row and row["attempt"] == self.attempt}


def run_rank(env: dict[str, str], log: str, fault: str) -> None:
    """In the forked process: becomes the rank that `python -m trireme_trainer` would be."""
    os.environ.update(env)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if fault:
        sys.path.insert(0, str(HERE))
        import faults

        getattr(faults, fault)(int(env[Env.RANK]))
    from trireme_trainer.__main__ import run

    run()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
