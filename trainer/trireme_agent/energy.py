"""Joules this pod used since the agent started, by component, each with the source it was read from.

gpu: NVML energy counter, else NVML power integrated over time. cpu: RAPL, else a declared model. dram: RAPL.
What cannot be read is `missing` with no number, never zero. RAPL counts the whole host: a pod's share is its share of
the CPU time the host spent, so idle power is divided among those who use it.
"""

from __future__ import annotations

import threading
import time
from typing import Callable, Dict, List, Mapping, Optional, Union

from trireme_api.protocol import EnergyReading

from trireme_agent import processes, rapl
from trireme_agent.nvml import Nvml, NvmlError, gpu_devices

MISSING = "missing"
SAMPLE_SECONDS = 1.0


class GpuMeter:
    """The GPUs' own counters; integrates power where a GPU has no energy counter."""

    def __init__(self, nvml: Nvml, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        self.joules: Optional[float] = None
        self.source = MISSING
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
            return
        done = self.joules or 0.0
        deltas = [new - old for new, old in zip(now, self._start)]
        self.joules = done + sum(delta if delta >= 0 else new for delta, new in zip(deltas, now))
        self._start = now

    def _integrate(self) -> None:
        try:
            power = sum(self._nvml.power_watts())
        except NvmlError:
            self._power = None
            return
        now = self._clock()
        if self._power is not None:
            # Trapezoid between samples; a gap with no reading is not filled in.
            self.joules = (self.joules or 0.0) + (power + self._power) / 2 * (now - self._at)
        elif self.joules is None:
            self.joules = 0.0
        self.source, self._power, self._at = "nvml-power", power, now


class RaplMeter:
    """This pod's share of the host's counters: by its share of the CPU time the host spent, sample by sample."""

    def __init__(
        self, counters: List[rapl.Counter], cpu_seconds: Callable[[], float], busy: Callable[[], Optional[float]]
    ) -> None:
        self._counters = counters
        self._cpu_seconds, self._busy = cpu_seconds, busy
        self.joules: Optional[float] = 0.0
        self.source = "rapl"
        self._host = 0.0
        self._own, self._all = cpu_seconds(), busy() or 0.0

    def sample(self) -> None:
        try:
            host = sum(counter.joules() for counter in self._counters)
        except OSError:
            return
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

    def sample(self) -> None:
        # Never back: time of a child that nobody waited for can vanish from the books.
        self.joules = max(self.joules or 0.0, self._cpu_seconds() * self._watts)


class MissingMeter:
    joules: Optional[float] = None
    source = MISSING

    def sample(self) -> None:
        pass


Meter = Union[GpuMeter, RaplMeter, DeclaredMeter, MissingMeter]


class Accountant:
    """Samples in a thread of its own, since a sick driver can block a read for minutes."""

    def __init__(
        self, watts_per_core: Optional[float], environ: Mapping[str, str], *,
        cpu_seconds: Callable[[], float] = processes.cpu_seconds,
        busy: Callable[[], Optional[float]] = processes.host_busy_seconds, rapl_root: str = rapl.ROOT,
        gpus: Optional[List[str]] = None,
    ) -> None:
        cpu, dram = rapl.zones("cpu", rapl_root), rapl.zones("dram", rapl_root)
        self._meters: Dict[str, Meter] = {}
        if cpu:
            self._meters["cpu"] = RaplMeter(cpu, cpu_seconds, busy)
        elif watts_per_core is not None:
            self._meters["cpu"] = DeclaredMeter(watts_per_core, cpu_seconds)
        else:
            self._meters["cpu"] = MissingMeter()
        self._meters["dram"] = RaplMeter(dram, cpu_seconds, busy) if dram else MissingMeter()
        self._gpus = gpu_devices() if gpus is None else gpus
        self._environ = environ
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._readings: Dict[str, EnergyReading] = {}
        if self._gpus:
            self._meters["gpu"] = MissingMeter()
        self._note()

    def start(self) -> None:
        threading.Thread(target=self._run, name="energy", daemon=True).start()

    def readings(self) -> Dict[str, EnergyReading]:
        """By component. A pod that has no GPU has no `gpu`; one whose GPUs cannot be read has it as missing."""
        with self._lock:
            return dict(self._readings)

    def sample(self) -> None:
        for meter in self._meters.values():
            meter.sample()
        self._note()

    def close(self) -> None:
        self._stop.set()

    def _note(self) -> None:
        readings = {name: EnergyReading(meter.joules, meter.source) for name, meter in self._meters.items()}
        with self._lock:
            self._readings = readings

    def _run(self) -> None:
        if self._gpus:
            try:
                nvml = Nvml(self._environ)
                if len(nvml):
                    self._meters["gpu"] = GpuMeter(nvml)
            except NvmlError:
                pass  # stays missing
        while not self._stop.wait(SAMPLE_SECONDS):
            self.sample()
