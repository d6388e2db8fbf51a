"""The processor's own energy counters (RAPL) under /sys/class/powercap: whole host, they wrap around."""

from __future__ import annotations

import glob
import os
import time
from dataclasses import dataclass
from typing import Callable, List, Optional

ROOT = "/sys/class/powercap"
MAX_WATTS = 1500.0
"""More than any socket or its memory draws: a counter that would have wrapped faster was set back instead."""


@dataclass
class Counter:
    """One zone; counts up to `span` microjoules and starts again at zero."""

    path: str
    span: int
    last: int
    clock: Callable[[], float] = time.monotonic
    total: int = 0

    def __post_init__(self) -> None:
        self._at = self.clock()

    def joules(self) -> float:
        """Since it was opened. Must be called more often than it wraps (minutes at full load). Raises OSError."""
        now, at = _read(self.path), self.clock()
        gained = now - self.last
        if gained < 0:
            gained += self.span
            if gained > MAX_WATTS * 1e6 * max(at - self._at, 0.0):
                gained = now  # since it was set back; what it had counted until then is lost
        self.total += gained
        self.last, self._at = now, at
        return self.total / 1e6


def zones(component: str, root: str = ROOT, clock: Callable[[], float] = time.monotonic) -> List[Counter]:
    """Counters of all sockets for `cpu` (package zones) or `dram` (their subzones); only those that can be read."""
    found = []
    # Flat links in /sys/class/powercap, a tree in /sys/devices/virtual/powercap: each zone once.
    patterns = ("*-rapl:*", "*-rapl/*-rapl:*", "*-rapl/*-rapl:*/*-rapl:*")
    folders = {os.path.realpath(path) for pattern in patterns for path in glob.glob(os.path.join(root, pattern))}
    for folder in sorted(folders):
        try:
            with open(os.path.join(folder, "name"), encoding="ascii") as file:
                name = file.read().strip()
        except OSError:
            continue
        if (component == "cpu" and name.startswith("package")) or (component == "dram" and name == "dram"):
            counter = _open(folder, clock)
            if counter is not None:
                found.append(counter)
    return found


def _open(folder: str, clock: Callable[[], float]) -> Optional[Counter]:
    path = os.path.join(folder, "energy_uj")
    try:
        return Counter(path, _read(os.path.join(folder, "max_energy_range_uj")), _read(path), clock)
    except OSError:
        return None  # since 2020 readable by root only, on many hosts


def _read(path: str) -> int:
    with open(path, encoding="ascii") as file:
        try:
            return int(file.read())
        except ValueError as error:
            raise OSError(f"{path}: {error}") from None
