"""Embodied carbon of hardware: a range from a table with its sources, by the name that the driver gives."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from trireme_api.carbon.grid import rows


@dataclass(frozen=True)
class Range:
    """Three estimates of one quantity; they are added and scaled together."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.mid * factor, self.high * factor)


NOTHING = Range(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Device:
    name: str
    embodied_kilograms: Range
    watts: float | None
    """Thermal design power; None where no source was at hand."""
    source: str
    match: str


@functools.cache
def devices() -> tuple[Device, ...]:
    """In the order in which they are tried."""
    return tuple(
        Device(
            row["name"],
            Range(float(row["low"]), float(row["mid"]), float(row["high"])),
            float(row["watts"]) if row["watts"] else None,
            row["source"],
            row["match"],
        )
        for row in rows("devices.csv")
    )


def _named(match: str) -> Device:
    return next(device for device in devices() if device.match == match)


def gpu(model: str | None) -> Device:
    """The GPU of a name as NVML gives it (`NVIDIA H100 80GB HBM3`); the generic one where it is not in the table.

    >>> gpu("NVIDIA A100-SXM4-40GB").embodied_kilograms.low
    127.6
    """
    # By whole parts of the name: no T4 in T400, no B200 in GB200.
    parts = set((model or "").upper().replace(" ", "-").split("-"))
    boards = (device for device in devices() if not device.match.endswith(("host", "gpu")))
    return next((d for d in boards if parts.issuperset(d.match.upper().split("-"))), _named("gpu"))


def host(gpus: int) -> Device:
    """Everything in a machine but its GPUs."""
    return _named("gpu-host" if gpus else "cpu-host")
