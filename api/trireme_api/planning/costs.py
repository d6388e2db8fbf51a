"""What a run costs beside time: energy and carbon as ranges, checkpoints, failures and what is left of the time."""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api import carbon
from trireme_api.carbon import JOULES_PER_KILOWATT_HOUR, Range
from trireme_api.carbon.policy import CarbonPolicy
from trireme_api.devices import Board
from trireme_api.families.memory import checkpoint_bytes
from trireme_api.planning.setting import Setting
from trireme_api.reliability import FAILURE_RATES, goodput, young

GPU_POWER = Range(0.6, 0.75, 1.0)
HOST_POWER = Range(0.2, 0.3, 1.0)
POWER_SOURCE = (
    "GPUs at 60, 75, 100 % of board power and hosts at 20, 30, 100 % of their most: the middle is 424 W an A100, BLOOM "
    "drew 401 with its host (2211.05100, 2211.02001: 433 MWh, 1.08 M hours); 400 is what OPT counted"
)
STORAGE = 1.0e9
"""Bytes per second and node, written or read. An assumption; say --storage."""
HOST_COPY = 10.0e9
"""Bytes per second from one device to its host: what a save blocks training for. An assumption (PCIe 4.0 x16: 32)."""
RECOVERY_SECONDS = 30.0
"""From a failure to the first new step, loading apart: what a replaced pod is meant to take at most (docs/chaos.md)."""


@dataclass(frozen=True)
class Footprint:
    watts: Range
    """Of one device with its part of the host."""
    kilowatt_hours: Range
    """At the devices and hosts; the building's share (PUE) comes on top."""
    operational_grams: Range
    embodied_grams: Range
    """By calendar, as SCI has it: the part of four years that the run takes."""
    pue: float
    intensity: carbon.Intensity
    grams_per_million_tokens: float
    """Of both, in the middle (SCI)."""


def footprint(
    setting: Setting, board: Board, seconds: float, tokens: float, policy: CarbonPolicy | None
) -> Footprint:
    """Of all devices for `seconds`. Raises carbon.UnknownZone."""
    watts = GPU_POWER * board.watts + HOST_POWER * board.host_watts
    hours = setting.ranks * seconds / 3600
    energy = watts * (hours / 1000)
    pue = policy.pue if policy else carbon.PUE
    named = carbon.intensity(policy.zone, policy.grams_per_kilowatt_hour) if policy else None
    grid = named or carbon.intensity("WORLD")
    assert grid is not None
    factor = carbon.operational_grams(JOULES_PER_KILOWATT_HOUR, pue, grid.grams_per_kilowatt_hour)
    hardware = carbon.gpu(board.driver).embodied_kilograms * setting.ranks
    hardware += carbon.host(board.per_node).embodied_kilograms * setting.nodes
    embodied = hardware * (1000 * carbon.embodied_share(seconds))
    operational = energy * factor
    each = carbon.sci(operational.mid, embodied.mid, tokens / 1e6)
    return Footprint(watts, energy, operational, embodied, pue, grid, each)


@dataclass(frozen=True)
class Checkpoint:
    bytes: float
    """Of one, on storage: weights and both moments, fp32."""
    write_seconds: float
    """Beside training."""
    blocked_seconds: float
    """Training waits for the copy to the host."""


def checkpoint(setting: Setting, storage: float = STORAGE) -> Checkpoint:
    size = float(checkpoint_bytes(setting.config))
    # One group of ranks has all of it; all ranks of that group write and copy at once.
    writers = -(-setting.shards // setting.per_node)
    return Checkpoint(size, size / (writers * storage), size / setting.shards / HOST_COPY)


@dataclass(frozen=True)
class Failures:
    """At one published rate."""

    name: str
    source: str
    hours_between: float
    expected: float
    """During the run."""
    save_every_seconds: float
    """Young's interval, no shorter than a save takes to write."""
    goodput: float


def failures(setting: Setting, saved: Checkpoint, seconds: float | None, storage: float = STORAGE) -> list[Failures]:
    """`seconds` of training without any failure; None: not known."""
    found = []
    recovery = RECOVERY_SECONDS + saved.bytes / (setting.nodes * storage)
    for rate in FAILURE_RATES:
        mtbf = rate.gpu_hours / setting.ranks * 3600
        every = max(young(saved.blocked_seconds, mtbf), saved.write_seconds)
        share = goodput(cost=saved.blocked_seconds, every=every, recovery=recovery, mtbf=mtbf)
        count = seconds / share / mtbf if seconds is not None and share else 0.0
        found.append(Failures(rate.name, rate.source, mtbf / 3600, count, every, share))
    return found
