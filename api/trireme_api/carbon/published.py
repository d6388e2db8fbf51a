"""Footprints that papers have printed, for comparison and as a check of our own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    name: str
    megawatt_hours: float | None
    grams_per_kilowatt_hour: float | None
    tonnes: float
    """As printed."""
    scope: str
    source: str


PUBLISHED = (
    Published(
        "OPT-175B", 324, 231, 75, "one run of training; with ablations and downtime about twice", "OPT (2205.01068)"
    ),
    Published("GPT-3", 1287, 429, 552, "one run of training", "Patterson et al. (2104.10350)"),
    Published("Gopher", 1066, None, 352, "one run of training", "BLOOM (2211.02001), Table 4"),
    Published("BLOOM", 433, 57, 25, "the energy of training alone", "BLOOM (2211.02001)"),
    Published("BLOOM, whole", None, 57, 81, "training 25, idle 45, embodied 11", "BLOOM (2211.02001)"),
)

BLOOM_SPLIT = {"embodied": 11.0, "dynamic": 25.0, "idle": 45.0}
"""Tonnes: what a tracker that counts neither idle nodes nor hardware does not see is two thirds."""


def compared(tonnes: float) -> dict[str, float]:
    """How often a footprint goes into each published one."""
    return {one.name: one.tonnes / tonnes for one in PUBLISHED} if tonnes > 0 else {}
