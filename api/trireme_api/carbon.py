"""From joules to grams of CO2e: operational = energy × PUE × grid intensity (location-based average).

The table is average carbon intensity of electricity generation per country, gCO2e/kWh, life cycle, data year 2023:
Our World in Data (CC BY 4.0; Ember and Energy Institute), as shipped in codecarbon 3.3.0 `global_energy_mix.json`.
World 2025: Ember Global Electricity Review 2026. `gramsPerKilowattHour` in the job overrides all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

JOULES_PER_KILOWATT_HOUR = 3.6e6

_OWID_2023 = {
    "CA": 170.0,
    "CN": 582.3,
    "DE": 381.0,
    "FR": 56.0,
    "GB": 237.6,
    "IE": 290.8,
    "IN": 713.4,
    "JP": 485.4,
    "NO": 30.1,
    "PL": 661.9,
    "SE": 40.7,
    "US": 369.5,
}
_WORLD_2025 = 458.0


@dataclass(frozen=True)
class Intensity:
    grams_per_kilowatt_hour: float
    source: str
    """Where the number is from, with its data year."""


class UnknownZone(ValueError):
    """The grid zone is not in the table; the text says which are, and the way round it."""


def intensity(zone: str | None, override: float | None = None) -> Intensity | None:
    """Grid intensity for a job; None when neither a zone nor a number was given. Raises UnknownZone."""
    if override is not None:
        return Intensity(override, "carbonPolicy.gramsPerKilowattHour")
    if zone is None:
        return None
    name = zone.upper()
    if name == "WORLD":
        return Intensity(_WORLD_2025, "Ember Global Electricity Review 2026, world average 2025")
    if name in _OWID_2023:
        return Intensity(_OWID_2023[name], f"Our World in Data (Ember), {name} 2023")
    known = ", ".join([*sorted(_OWID_2023), "WORLD"])
    raise UnknownZone(f"no grid intensity known for {zone!r}; use one of {known}, or set gramsPerKilowattHour")


def operational_grams(joules: float, pue: float, grams_per_kilowatt_hour: float) -> float:
    """Grams of CO2e for `joules` at the devices.

    >>> round(operational_grams(324e3 * JOULES_PER_KILOWATT_HOUR, 1.0, 231) / 1e6, 1)  # OPT-175B: 324 MWh, tonnes
    74.8
    """
    return joules / JOULES_PER_KILOWATT_HOUR * pue * grams_per_kilowatt_hour
