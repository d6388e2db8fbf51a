"""The processor's own energy counters (RAPL) under /sys/class/powercap: whole host, they wrap around."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from typing import List, Optional

ROOT = "/sys/class/powercap"


@dataclass
class Counter:
    """One zone; counts up to `span` microjoules and starts again at zero."""

    path: str
    span: int
    last: int
    total: int = 0

    def joules(self) -> float:
        """Since it was opened. Must be called more often than it wraps (minutes at full load). Raises OSError."""
        now = _read(self.path)
        self.total += now - self.last if now >= self.last else now + self.span - self.last
        self.last = now
        return self.total / 1e6


def zones(component: str, root: str = ROOT) -> List[Counter]:
    """Counters of all sockets for `cpu` (package zones) or `dram` (their subzones); only those that can be read."""
    found = []
    for folder in sorted(glob.glob(os.path.join(root, "*-rapl:*"))):
        try:
            with open(os.path.join(folder, "name"), encoding="ascii") as file:
                name = file.read().strip()
        except OSError:
            continue
        if (component == "cpu" and name.startswith("package")) or (component == "dram" and name == "dram"):
            counter = _open(folder)
            if counter is not None:
                found.append(counter)
    return found


def _open(folder: str) -> Optional[Counter]:
    path = os.path.join(folder, "energy_uj")
    try:
        return Counter(path, _read(os.path.join(folder, "max_energy_range_uj")), _read(path))
    except OSError:
        return None  # since 2020 readable by root only, on many hosts


def _read(path: str) -> int:
    with open(path, encoding="ascii") as file:
        try:
            return int(file.read())
        except ValueError as error:
            raise OSError(f"{path}: {error}") from None
