"""A SIMULATED energy counter: a folder like /sys/class/powercap, for machines (most virtual ones) that have none.

Nobody's watts: they rise and fall, so that whoever takes them for constant is wrong, and the counters wrap several
times in a run. What is tested with it is how energy is read, shared out, added up and told, not how much it is.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from accounts.background import Background
from accounts.witness import host_busy

TICK = 0.1
"""Seconds between two writes."""
ZONES = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "dram"}
SPAN = 5_000_000_000
"""Microjoules at which a counter starts again at zero."""


def watts(name: str, at: float, busy: float) -> float:
    """Of a zone, with `busy` processors at work."""
    if name == "dram":
        return 3.0 + math.sin(2 * math.pi * at / 47)
    return 18.0 + 14.0 * busy + 6.0 * math.sin(2 * math.pi * at / 61)


class SimulatedPowercap(Background):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self._counts = dict.fromkeys(ZONES, 0.9 * SPAN)
        for zone, name in ZONES.items():
            folder = root / zone
            folder.mkdir(parents=True)
            folder.chmod(0o755)
            for file, text in (("name", name), ("max_energy_range_uj", str(SPAN))):
                (folder / file).write_text(text + "\n")
            self._write(zone)
        root.chmod(0o755)

    def _run(self) -> None:
        began = at = time.monotonic()
        busy = host_busy()
        while not self._stop.wait(TICK):
            now, all_busy = time.monotonic(), host_busy()
            for zone, name in ZONES.items():
                drawn = watts(name, now - began, (all_busy - busy) / (now - at)) * (now - at)
                self._counts[zone] = (self._counts[zone] + 1e6 * drawn) % SPAN
                self._write(zone)
            at, busy = now, all_busy

    def _write(self, zone: str) -> None:
        """At once, as a read of the kernel's file is: no reader sees half a number."""
        new = self.root / zone / "energy_uj.new"
        new.write_text(f"{int(self._counts[zone])}\n")
        new.replace(self.root / zone / "energy_uj")
