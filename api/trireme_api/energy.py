"""What a pod has used: energy by component, and for how long it held which hardware.

Standard library only and Python 3.9 syntax: travels with the agent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from trireme_api.wire import Message

MISSING = "missing"
SOURCES = ("nvml", "nvml-power", "rapl", "declared", MISSING)
"""Best first; a sum is as good as its weakest part."""


@dataclass
class EnergyReading(Message):
    joules: Optional[float] = None
    """Since the agent started; None when the source is missing."""
    source: str = MISSING
    """nvml | nvml-power | rapl | declared | missing"""
    stale: Optional[bool] = None
    """True: the counter cannot be read now, so that energy used since the last reading is not in `joules` yet."""


@dataclass
class Hardware(Message):
    """What the pod holds, whether its ranks run or not."""

    seconds: float = 0.0
    """Since the agent started, by its monotonic clock."""
    gpus: int = 0
    gpu_model: Optional[str] = None
    """As the driver names it; absent where it cannot be asked."""
