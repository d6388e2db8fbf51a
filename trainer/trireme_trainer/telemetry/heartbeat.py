"""The heartbeat: one small file per rank, replaced atomically: step, phase, progress and failure, for the agent."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from trireme_api.heartbeat import Heartbeat, heartbeat_name
from trireme_api.protocol import Cause, CheckpointRef, Env, Failure, PhaseTime, Progress, clean_text

from trireme_trainer.telemetry.ledger import Ledger

INTERVALS = 20


class Pulse:
    """Keeps what this rank last said about itself and writes it whenever something changes.

    Without a directory (no agent) everything is kept and nothing written. A full or vanished directory never ends
    training: the agent notices a silent rank by itself.
    """

    def __init__(self, directory: Path | None, *, local_rank: int, rank: int, attempt: int, started: float) -> None:
        self._path = str(directory / heartbeat_name(local_rank)) if directory else None
        self._rank = rank
        self.phases = PhaseTime(started=started)
        self.ledger = Ledger(started)
        self._reached = {"started": started}
        self.beats = 0
        """Rises whenever this rank says that it got on."""
        self.intervals: deque[float] = deque(maxlen=INTERVALS)
        """Seconds per step, newest last."""
        self._stepped: float | None = None
        self.own_seconds: float | None = None
        """What this rank itself spends on a step, where that is known."""
        self._beat = Heartbeat(step=0, phase="start", time=time.time(), attempt=attempt, phases=self.phases)
        if directory:
            with contextlib.suppress(OSError):
                directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def from_environment(cls, env: Mapping[str, str], started: float) -> Pulse:
        """Needs nothing to be right: it must be able to report that something else is wrong."""

        def number(name: str) -> int:
            text = env.get(name, "")
            return int(text) if text.isdecimal() else 0

        directory = env.get(Env.HEARTBEAT_DIR)
        return cls(
            Path(directory) if directory else None,
            local_rank=number(Env.LOCAL_RANK),
            rank=number(Env.RANK),
            attempt=number(Env.ATTEMPT),
            started=started,
        )

    def beat(
        self,
        phase: str | None = None,
        *,
        step: int | None = None,
        progress: Progress | None = None,
        checkpoint: CheckpointRef | None = None,
    ) -> None:
        """`step`: optimiser steps done. What is not given stays as it was."""
        beat = self._beat
        beat.phase = phase or beat.phase
        if step is not None:
            self._step_to(step)
        beat.own_seconds = None if self.own_seconds is None else round(self.own_seconds, 6)
        self.beats += 1
        beat.progress = progress or beat.progress
        beat.checkpoint = checkpoint or beat.checkpoint
        self._write()

    def _step_to(self, step: int) -> None:
        now, gained = time.monotonic(), step - self._beat.step
        if gained > 0 and self._stepped is not None:
            self.intervals.append((now - self._stepped) / gained)
        self._stepped = now if gained > 0 else None
        self._beat.step = step

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self._beat.step

    @property
    def phase(self) -> str:
        return self._beat.phase

    def answers(self, stack_signal: int | None) -> None:
        """Tells the agent the signal on which this rank writes its stacks."""
        self._beat.stack_signal = stack_signal

    def reached(self, milestone: str) -> None:
        """Notes the time at which this attempt reached a milestone, the first time only: those of PhaseTime are told
        to the agent, others (imported) only to the log."""
        if milestone not in self._reached:
            self._reached[milestone] = time.time()
            if hasattr(self.phases, milestone):
                setattr(self.phases, milestone, self._reached[milestone])

    def fail(
        self, cause: Cause, message: str, *, exit_code: int, traceback: str | None = None,
        missing: list[int] | None = None,
    ) -> None:  # fmt: skip
        self._beat.failure = Failure(
            cause=cause,
            message=clean_text(message),
            rank=self._rank,
            exit=exit_code,
            traceback=clean_text(traceback) if traceback else None,
            at=time.time(),
            missing=missing,
        )
        self._write()

    def startup_seconds(self) -> dict[str, float]:
        """Seconds from one milestone to the next: where a restart spends its time."""
        return {name: round(at - before, 3) for (_, before), (name, at) in pairwise(self._reached.items())}

    def _write(self) -> None:
        self._beat.time = time.time()
        if self._path is None:
            return
        self._beat.spent = self.ledger.told()
        content = json.dumps(self._beat.to_json()).encode()
        # Few system calls: it is done with each step.
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{self._path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, content)
            finally:
                os.close(descriptor)
            os.replace(f"{self._path}.tmp", self._path)


def process_start() -> float:
    """Unix seconds at which this process began, before anything was imported; now, where /proc does not tell.

    Now, too, in a warm standby: it has torch imported already, and begins when it is woken.
    """
    if "torch" in sys.modules:
        return time.time()
    try:
        with open("/proc/self/stat", encoding="ascii") as stat:
            ticks = float(stat.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as uptime:
            up = float(uptime.read().split()[0])
        return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
