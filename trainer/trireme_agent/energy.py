"""Joules this pod used since the agent started, by component, each with the source it was read from.

gpu: NVML energy counter, else NVML power integrated over time, else declared watts per GPU. cpu: RAPL, else declared
watts per busy core. dram: RAPL, else declared watts per gigabyte in use. What cannot be read and is not declared is
`missing` with no number, never zero. RAPL counts the whole host: a pod's share is its share of the CPU time the host
spent, so idle power is divided among those who use it. There is one accountant in a pod, however many ranks it has.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Protocol, Sequence

from trireme_api.protocol import MISSING, EnergyReading, Hardware

from trireme_agent import cgroup, processes, rapl
from trireme_agent.nvml import Nvml, NvmlError, gpu_devices

SAMPLE_SECONDS = 1.0
DRIVER_SECONDS = 30.0
"""A driver that has not answered for so long counts as one that cannot be asked."""
STALE_SECONDS = 30.0
"""A counter that cannot be read for so long is told to be stale; most come back, and have counted on."""


class Meter(Protocol):
    joules: Optional[float]
    source: str
    stale_since: Optional[float]
    """By the monotonic clock; None while it can be read."""

    def sample(self) -> None: ...


class GpuMeter:
    """The GPUs' own counters; integrates power where a GPU has no energy counter."""

    def __init__(self, nvml: Nvml, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        self.joules: Optional[float] = None
        self.source = MISSING
        self.stale_since: Optional[float] = None
        self._start: Optional[List[float]] = None
        self._power: Optional[float] = None
        self._at = clock()
        try:
            self._start = nvml.energy_joules()
            self.source, self.joules = "nvml", 0.0
        except NvmlError:
            self._integrate()

    def sample(self) -> None:
        """A counter that fails once keeps its value; one that jumps back (driver reload) starts anew from zero."""
        if self._start is None:
            self._integrate()
            return
        try:
            now = self._nvml.energy_joules()
        except NvmlError:
            self.stale_since = self.stale_since or self._clock()
            return
        done = self.joules or 0.0
        deltas = [new - old for new, old in zip(now, self._start)]
        self.joules = done + sum(delta if delta >= 0 else new for delta, new in zip(deltas, now))
        self._start, self.stale_since = now, None

    def _integrate(self) -> None:
        try:
            power = sum(self._nvml.power_watts())
        except NvmlError:
            self._power = None
            if self.joules is not None:
                self.stale_since = self.stale_since or self._clock()
            return
        now = self._clock()
        if self._power is not None:
            # Trapezoid between samples; a gap with no reading is not filled in.
            self.joules = (self.joules or 0.0) + (power + self._power) / 2 * max(0.0, now - self._at)
        elif self.joules is None:
            self.joules = 0.0
        self.source, self._power, self._at, self.stale_since = "nvml-power", power, now, None


class RaplMeter:
    """This pod's share of the host's counters: by its share of the CPU time the host spent, sample by sample."""

    def __init__(
        self, counters: List[rapl.Counter], cpu_seconds: Callable[[], float], busy: Callable[[], Optional[float]]
    ) -> None:
        self._counters = counters
        self._cpu_seconds, self._busy = cpu_seconds, busy
        self.joules: Optional[float] = 0.0
        self.source = "rapl"
        self.stale_since: Optional[float] = None
        self._host = 0.0
        self._own, self._all = cpu_seconds(), busy() or 0.0

    def sample(self) -> None:
        try:
            host = sum(counter.joules() for counter in self._counters)
        except OSError:
            self.stale_since = self.stale_since or time.monotonic()
            return
        self.stale_since = None
        own, everyone = self._cpu_seconds(), self._busy()
        if everyone is None or everyone <= self._all:
            return  # no tick of the host's clock in between: the energy is shared out at the next sample
        share = min(1.0, max(0.0, own - self._own) / (everyone - self._all))
        self.joules = (self.joules or 0.0) + (host - self._host) * share
        self._host, self._own, self._all = host, own, everyone


class DeclaredMeter:
    """CPU seconds × declared watts per busy core."""

    def __init__(self, watts_per_core: float, cpu_seconds: Callable[[], float]) -> None:
        self._watts, self._cpu_seconds = watts_per_core, cpu_seconds
        self.joules: Optional[float] = 0.0
        self.source = "declared"
        self.stale_since: Optional[float] = None

    def sample(self) -> None:
        # Never back: time of a child that nobody waited for can vanish from the books.
        self.joules = max(self.joules or 0.0, self._cpu_seconds() * self._watts)


class DeclaredPower:
    """Declared watts over time: of GPUs that cannot be asked, of memory in use."""

    def __init__(self, watts: Callable[[], Optional[float]], clock: Callable[[], float] = time.monotonic) -> None:
        self._watts, self._clock = watts, clock
        self._at = clock()
        self.joules: Optional[float] = 0.0
        self.source = "declared"
        self.stale_since: Optional[float] = None

    def sample(self) -> None:
        now, watts = self._clock(), self._watts()
        self.stale_since = None if watts is not None else self.stale_since or now
        if watts is not None:
            self.joules = (self.joules or 0.0) + watts * max(0.0, now - self._at)
        self._at = now


class MissingMeter:
    joules: Optional[float] = None
    source = MISSING
    stale_since: Optional[float] = None

    def sample(self) -> None:
        pass


@dataclass(frozen=True)
class Declared:
    """Watts to reckon with where nothing can be read; None: then it is missing."""

    per_core: Optional[float] = None
    """Of a busy core."""
    per_gigabyte: Optional[float] = None
    """Of memory in use."""
    per_gpu: Optional[float] = None


class Accountant:
    """Samples in threads of its own, the GPUs' apart, since a sick driver can block a read for minutes."""

    def __init__(
        self, declared: Declared, environ: Mapping[str, str], *,
        cpu_seconds: Callable[[], float] = processes.cpu_seconds,
        busy: Callable[[], Optional[float]] = processes.host_busy_seconds,
        memory: Callable[[], Optional[int]] = cgroup.memory_bytes, rapl_root: str = rapl.ROOT,
        gpus: Optional[List[str]] = None, open_nvml: Callable[[Mapping[str, str]], Nvml] = Nvml,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._declared, self._environ, self._open_nvml, self._clock = declared, environ, open_nvml, clock
        self._began = clock()
        cpu, dram = rapl.zones("cpu", rapl_root, clock), rapl.zones("dram", rapl_root, clock)
        self._meters: Dict[str, Meter] = {"cpu": MissingMeter(), "dram": MissingMeter()}
        if cpu:
            self._meters["cpu"] = RaplMeter(cpu, cpu_seconds, busy)
        elif declared.per_core is not None:
            self._meters["cpu"] = DeclaredMeter(declared.per_core, cpu_seconds)
        if dram:
            self._meters["dram"] = RaplMeter(dram, cpu_seconds, busy)
        elif declared.per_gigabyte is not None and memory() is not None:
            self._meters["dram"] = DeclaredPower(lambda: _scaled(memory(), declared.per_gigabyte), clock)
        self._gpus = gpu_devices() if gpus is None else gpus
        self._count = len(self._gpus)
        self._model: Optional[str] = None
        self._asked = False
        self._meters["gpu"] = MissingMeter()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._readings: Dict[str, EnergyReading] = {}
        self._note(("cpu", "dram"))

    def start(self) -> None:
        threading.Thread(target=self._run, args=(("cpu", "dram"),), name="energy", daemon=True).start()
        if self._gpus:
            threading.Thread(target=self._run_gpus, name="energy-gpu", daemon=True).start()

    def readings(self) -> Dict[str, EnergyReading]:
        """By component. A pod that has no GPU has no `gpu`; one whose GPUs cannot be read has it as missing."""
        with self._lock:
            found = dict(self._readings)
        if self._gpus and not self._asked and self.hardware().seconds > DRIVER_SECONDS:
            found["gpu"] = EnergyReading()
        return found

    def hardware(self) -> Hardware:
        return Hardware(max(0.0, self._clock() - self._began), self._count, self._model)

    def sample(self, names: Sequence[str] = ("cpu", "dram", "gpu")) -> None:
        for name in names:
            self._meters[name].sample()
        self._note(names)

    def close(self) -> None:
        self._stop.set()

    def find_gpus(self) -> None:
        """Opens the driver's library: best its counters, then its power, then what is declared."""
        try:
            nvml = self._open_nvml(self._environ)
            self._count, self._model = len(nvml), nvml.model()
            meter = GpuMeter(nvml, self._clock)
            if self._count and meter.source != MISSING:
                self._meters["gpu"] = meter
        except NvmlError:
            pass  # a driver that cannot be asked: the device files say how many there are
        if self._declared.per_gpu is not None and self._meters["gpu"].source == MISSING:
            watts = self._declared.per_gpu * self._count
            self._meters["gpu"] = DeclaredPower(lambda: watts, self._clock)
        self._asked = True
        self._note(("gpu",))

    def _note(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                meter = self._meters[name]
                if name != "gpu" or (self._asked and self._count):  # none: the pod sees GPUs and was given none
                    stale = meter.stale_since is not None and self._clock() - meter.stale_since > STALE_SECONDS
                    self._readings[name] = EnergyReading(meter.joules, meter.source, True if stale else None)

    def _run(self, names: Sequence[str]) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.sample(names)

    def _run_gpus(self) -> None:
        self.find_gpus()
        self._run(("gpu",))


def _scaled(used: Optional[int], watts_per_gigabyte: Optional[float]) -> Optional[float]:
    return None if used is None or watts_per_gigabyte is None else used / 1e9 * watts_per_gigabyte
