"""Reads the same counters as the agents do, from outside the pods and with code of its own: the machine's energy, and
each container's processor time as its control group counts it (agents add up /proc/PID/stat of their processes)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos.arena import Json, agent_of
from chaos.measure import Broken

from accounts.background import Background

EVERY = 0.5
"""Seconds between two readings; agents read once a second."""
TICKS = os.sysconf("SC_CLK_TCK")


def host_busy() -> float:
    """Seconds that this machine's processors have not been idle."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def container_usage(pid: int) -> Callable[[], float]:
    """Reads the processor seconds of the control group that a process is in; of both versions of control groups."""
    groups = dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    for controllers, path in groups.items():
        if "cpuacct" in controllers.split(","):
            usage = Path("/sys/fs/cgroup/cpuacct") / path.lstrip("/") / "cpuacct.usage"
            return lambda: int(usage.read_text()) / 1e9
    stat = Path("/sys/fs/cgroup") / groups[""].lstrip("/") / "cpu.stat"
    return lambda: int(stat.read_text().split()[1]) / 1e6


@dataclass
class Integral:
    """Joules of one pod: at each reading its share of what the machine has drawn since the last one. Pure."""

    cpu: float
    joules: dict[str, float] = field(default_factory=dict)

    def add(self, drawn: dict[str, float], cpu: float, busy: float) -> None:
        """`drawn`: the machine's joules since the last reading, `busy` its busy seconds; `cpu`: the pod's, in all."""
        share = min(1.0, (cpu - self.cpu) / busy) if busy > 0 else 0.0
        self.cpu = cpu
        for name, joules in drawn.items():
            self.joules[name] = self.joules.get(name, 0.0) + joules * share


def gained(before: int, now: int, span: int) -> int:
    """Of a counter that wraps."""
    return now - before if now >= before else now - before + span


class Witness(Background):
    """From `with` to its end. `pods` tells of the job's pods; `root` is the folder of energy counters."""

    def __init__(self, root: Path, pods: Callable[[], list[Json]]) -> None:
        super().__init__()
        self._root, self._pods = root, pods
        self.by_pod: dict[str, Integral] = {}
        """By UID."""
        self._usage: dict[str, Callable[[], float]] = {}
        self.trouble: list[str] = []

    def joules(self) -> dict[str, float]:
        """By component, of all pods."""
        found: dict[str, float] = {}
        for integral in list(self.by_pod.values()):
            for name, joules in integral.joules.items():
                found[name] = found.get(name, 0.0) + joules
        return found

    def _run(self) -> None:
        zones = {"cpu": self._root / "intel-rapl:0", "dram": self._root / "intel-rapl:0:0"}
        spans = {name: int((zone / "max_energy_range_uj").read_text()) for name, zone in zones.items()}
        counts, busy = {name: _count(zone) for name, zone in zones.items()}, host_busy()
        while not self._stop.wait(EVERY):
            self._find()
            now, all_busy = {name: _count(zone) for name, zone in zones.items()}, host_busy()
            drawn = {name: gained(counts[name], now[name], spans[name]) / 1e6 for name in zones}
            for uid, usage in list(self._usage.items()):
                try:
                    self.by_pod[uid].add(drawn, usage(), all_busy - busy)
                except OSError:  # the container is gone
                    del self._usage[uid]
            counts, busy = now, all_busy

    def _find(self) -> None:
        """Pods whose agent has just been started: before the API server calls them running."""
        try:
            pods = [pod for pod in self._pods() if pod["metadata"]["uid"] not in self.by_pod]
        except OSError as error:
            self.trouble.append(str(error))
            return
        for pod in pods:
            with contextlib.suppress(OSError, Broken):  # not started yet
                usage = container_usage(agent_of(pod))
                uid = pod["metadata"]["uid"]
                self._usage[uid], self.by_pod[uid] = usage, Integral(usage())


def _count(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())
