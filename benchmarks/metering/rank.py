"""A rank whose metering is switched on and off in turn. overhead.py has the agent start it in the trainer's place.

Off: no heartbeat, no step log, no series, no console line, no ledger, and the agent (energy, reports, what it serves)
is stopped by SIGSTOP. The hang watch runs in both. On the way the time inside the metering calls is taken, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trireme_trainer import __main__ as trainer
from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.ledger import Ledger
from trireme_trainer.telemetry.reporting import Reporter

WINDOW_SECONDS = float(os.environ["BENCHMARK_WINDOW_SECONDS"])
ORDER = (True, False, False, True)
"""So that what drifts in one direction favours neither."""
SKIPPED_STEPS = 20


def agent_seconds(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[0])
    return total / 1e9


class Switch:
    def __init__(self) -> None:
        self.on = True
        self.inside = 0
        self.metered = 0.0
        """Seconds of this thread's CPU time in metering calls, in this window."""
        self._agent = os.getppid()
        self._log = Path(os.environ["BENCHMARK_WINDOWS"]).open("a", buffering=1)  # noqa: SIM115
        self._steps = self._number = 0
        self._warm = SKIPPED_STEPS
        self._open()

    def _open(self) -> None:
        self._at, self._cpu, self._agents = time.perf_counter(), time.process_time(), agent_seconds(self._agent)
        self._steps, self.metered = 0, 0.0

    def stepped(self) -> None:
        """After each step: counts it, and opens the next window when this one is over."""
        if self._warm:
            self._warm -= 1
            self._open()
            return
        self._steps += 1
        if time.perf_counter() - self._at < WINDOW_SECONDS:
            return
        row = {
            "on": self.on, "steps": self._steps, "seconds": time.perf_counter() - self._at,
            "rankCpu": time.process_time() - self._cpu, "agentCpu": agent_seconds(self._agent) - self._agents,
            "meteredCpu": self.metered,
        }  # fmt: skip
        self._log.write(json.dumps(row) + "\n")
        self._number += 1
        self.on = ORDER[self._number % len(ORDER)]
        os.kill(self._agent, signal.SIGCONT if self.on else signal.SIGSTOP)
        self._open()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        self.inside += 1
        began = time.thread_time()
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:
                self.metered += time.thread_time() - began


switch = Switch()


def switched(call: Callable[..., Any]) -> Callable[..., Any]:
    """Does nothing while off; its time is taken while on, once where such calls nest."""

    def instead(*given: Any, **named: Any) -> Any:
        if not switch.on:
            return None
        with switch.timed():
            return call(*given, **named)

    return instead


report = switched(Reporter.step)


def step(self: Reporter, *given: Any, **named: Any) -> None:
    report(self, *given, **named)
    switch.stepped()


Reporter.step = step  # type: ignore[method-assign]
Pulse.beat = switched(Pulse.beat)  # type: ignore[method-assign]
Ledger.enter = switched(Ledger.enter)  # type: ignore[method-assign]

if __name__ == "__main__":
    try:
        code = trainer.main()
    finally:
        os.kill(os.getppid(), signal.SIGCONT)
    sys.stdout.flush()
    os._exit(code)
