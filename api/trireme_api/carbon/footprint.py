"""From joules and machine hours to grams of CO2e.

    operational = energy × PUE × grid intensity                                   (location-based, average)
    embodied    = made × hours / (life × 8,760 h)            calendar             (SCI, ISO/IEC 21031)
                = made × hours / (life × 8,760 h × use)      busy                 (Sustainable AI, 2111.00364)
    SCI         = (operational + embodied) / functional unit

PUE goes into energy and nowhere else, and once. Certificates and offsets are no part of any of it.
"""

from __future__ import annotations

from typing import Literal

JOULES_PER_KILOWATT_HOUR = 3.6e6
HOURS_PER_YEAR = 8760.0
GRAMS_PER_POUND = 453.59237
SECONDS_PER_YEAR = HOURS_PER_YEAR * 3600
LIFE_YEARS = 4.0
"""SCI's example and Cloud Carbon Footprint; the middle of Sustainable AI's 3 to 5."""
UTILISATION = 0.45
"""The middle of Sustainable AI's 30 to 60 %."""
PUE = 1.1
"""Sustainable AI (2111.00364)."""

Mode = Literal["calendar", "busy"]
"""calendar: life is shared out by the hour, and idle hours are nobody's. busy: they fall on the hours in use."""


def operational_grams(joules: float, pue: float, grams_per_kilowatt_hour: float) -> float:
    """Grams of CO2e for `joules` at the devices.

    >>> round(operational_grams(324e3 * JOULES_PER_KILOWATT_HOUR, 1.0, 231) / 1e6, 1)  # OPT-175B: 324 MWh, tonnes
    74.8
    """
    if pue < 1:
        raise ValueError(f"PUE is all energy over that of the devices and cannot be under 1 (got {pue:g})")
    if joules < 0 or grams_per_kilowatt_hour < 0:
        raise ValueError(f"neither {joules:g} J nor {grams_per_kilowatt_hour:g} g/kWh can be")
    return joules / JOULES_PER_KILOWATT_HOUR * pue * grams_per_kilowatt_hour


def embodied_share(
    seconds: float, *, mode: Mode = "calendar", life_years: float = LIFE_YEARS, utilisation: float = UTILISATION
) -> float:
    """The part of what a device cost to make that falls on `seconds` of its use.

    >>> round(1_000_000 * embodied_share(3600), 1)  # SCI's example: 1,000 kg, 4 years, 1 hour; it prints 28 grams
    28.5
    >>> round(2000 * embodied_share(3600, mode="busy"), 3)  # Sustainable AI: kg per busy hour of a GPU system
    0.127
    """
    if seconds < 0 or life_years <= 0 or not 0 < utilisation <= 1:
        raise ValueError(f"no such use: {seconds:g} s of {life_years:g} years, {utilisation:g} of them busy")
    return seconds / (life_years * SECONDS_PER_YEAR * (utilisation if mode == "busy" else 1.0))


def sci(operational_grams: float, embodied_grams: float, units: float) -> float:
    """Software Carbon Intensity: grams per functional unit, which here is a million tokens."""
    if units <= 0:
        raise ValueError(f"SCI is per functional unit; there are none (got {units:g})")
    return (operational_grams + embodied_grams) / units


def mass(grams: float) -> str:
    """Grams for people: 0.42g, 3.1kg, 74.8t."""
    for unit, size in (("t", 1e6), ("kg", 1e3)):
        if grams >= size:
            return f"{grams / size:.3g}{unit}"
    return f"{grams:.3g}g"
