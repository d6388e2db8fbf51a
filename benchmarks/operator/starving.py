"""An operator that is started with a share of a core while its agents all come to it at once, and is then let go."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agents import StandIn
from rig import OperatorProcess, World
from trireme_operator.options import DEFAULT_NAMESPACE

SLICE_SECONDS = 0.1
"""As the kernel's bandwidth control has it: so much of each is run, the rest stands still."""
THROTTLE = """
import os, signal, sys, time
pid, on, off = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
while True:
    os.kill(pid, signal.SIGCONT); time.sleep(on); os.kill(pid, signal.SIGSTOP); time.sleep(off)
"""


@contextmanager
def throttled(pid: int, share: float) -> Iterator[None]:
    times = [str(SLICE_SECONDS * part) for part in (share, 1 - share)]
    with subprocess.Popen([sys.executable, "-c", THROTTLE, str(pid), *times]) as throttle:
        try:
            yield
        finally:
            throttle.kill()
            throttle.wait()
            os.kill(pid, signal.SIGCONT)


class Lease:
    """What the API server knows of the leadership."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._path = (
            f"/apis/coordination.k8s.io/v1/namespaces/{DEFAULT_NAMESPACE}/leases/lease-{world.namespace}"
        )
        self._renewed, self._seen = "", time.monotonic()
        self.longest = 0.0
        """Seconds between two renewals as seen here."""

    def look(self) -> None:
        spec = self._world.api.request("GET", self._path, timeout=30.0)["spec"]
        if spec["renewTime"] != self._renewed:
            self._renewed, self._seen = spec["renewTime"], time.monotonic()
        self.longest = max(self.longest, time.monotonic() - self._seen)


async def starve(
    world: World, operator: OperatorProcess, agents: list[StandIn], share: float, seconds: float,
    cpu: Callable[[int], float],
) -> dict[str, Any]:  # fmt: skip
    operator.kill()
    await asyncio.sleep(2.0)  # in which the last answers come in
    began = time.monotonic()
    operator.start(ready=False)
    assert operator.process is not None
    pid, already = operator.process.pid, operator.log.read_text().count("starting anew")
    for agent in agents:
        agent.answers, agent.troubles, agent.told_away, agent.answered_at = [], 0, 0, 0.0
    heard: dict[str, float] = {}
    with throttled(pid, share):
        lease, first = None, 0.0
        while time.monotonic() < began + seconds:
            await asyncio.sleep(1.0)
            answered = sum(agent.answered_at > began for agent in agents)
            if answered and not first:
                first, lease = time.monotonic(), Lease(world)
            if lease is not None:
                await asyncio.to_thread(lease.look)
            for part in (0.5, 0.9, 1.0):
                if answered >= part * len(agents):
                    heard.setdefault(f"{part:.0%}", time.monotonic() - began)
        used = cpu(pid) / (time.monotonic() - began)
        recent = sum(agent.answered_at > time.monotonic() - 60 for agent in agents)
        found = {
            "share": share,
            "seconds": seconds,
            "operatorCpu": used,
            "firstAnswer": first - began if first else None,
            "everyAgentAnswered": heard,
            "answeredInLastMinute": recent,
            "reportsAnswered": sum(len(agent.answers) for agent in agents),
            "toldToComeLater": sum(agent.told_away for agent in agents),
            "troubles": sum(agent.troubles for agent in agents),
            "longestWithoutRenewal": lease.longest if lease is not None else None,
            "leaseLost": operator.log.read_text().count("starting anew") - already,
        }
    free = time.monotonic()
    while time.monotonic() < free + 300 and any(agent.answered_at < free for agent in agents):
        await asyncio.sleep(0.5)
    return {**found, "everyAgentAnsweredAfterwards": time.monotonic() - free}
