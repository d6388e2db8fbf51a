"""Grid intensity by zone: the shipped table, and what a job or a cluster gives instead."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources

SOURCES = {
    "owid": "Our World in Data (Ember, Energy Institute)",
    "egrid": "EPA eGRID2023, at the stack",
    "ember": "Ember Global Electricity Review 2026",
}
MAX_GRAMS_PER_KILOWATT_HOUR = 2000.0
"""Above any grid's average (Turkmenistan, the dirtiest of the table, has 1,306): a larger number is a wrong unit."""


@dataclass(frozen=True)
class Intensity:
    grams_per_kilowatt_hour: float
    source: str
    """Where the number is from, with its data year or time."""
    zone: str | None = None


@dataclass(frozen=True)
class Zone:
    code: str
    iso3: str
    name: str
    grams_per_kilowatt_hour: float
    year: int
    source: str
    """A key of SOURCES."""

    @property
    def intensity(self) -> Intensity:
        return Intensity(
            self.grams_per_kilowatt_hour, f"{SOURCES[self.source]}, {self.name} {self.year}", self.code
        )


class UnknownZone(ValueError):
    """The grid zone is not in the table; the text says the way round it."""


def rows(name: str) -> Iterator[dict[str, str]]:
    """A shipped table; lines that begin with # say where it is from."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    yield from csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))


@functools.cache
def table() -> Mapping[str, Zone]:
    """By zone code."""
    return {
        row["zone"]: Zone(
            row["zone"],
            row["iso3"],
            row["name"],
            float(row["grams_per_kilowatt_hour"]),
            int(row["year"]),
            row["source"],
        )
        for row in rows("grid.csv")
    }


@functools.cache
def _names() -> Mapping[str, str]:
    """Every way to write a zone, in capitals, to its code: alpha-2 or alpha-3."""
    return {name: zone.code for zone in table().values() for name in (zone.code, zone.iso3) if name}


def find(zone: str) -> Zone:
    """The row of a zone given as ISO 3166 alpha-2, alpha-3, US-STATE or WORLD. Raises UnknownZone."""
    known = _names()
    code = known.get(zone.strip().upper())
    if code is None:
        raise UnknownZone(
            f"no grid intensity known for {zone!r}; use an ISO 3166 country code such as SE, a state of the USA such as"
            " US-CA, or WORLD, or set gramsPerKilowattHour"
        )
    return table()[code]


def intensity(
    zone: str | None, override: float | None = None, cluster: Mapping[str, float] | None = None
) -> Intensity | None:
    """Average intensity for a job: its own number, else the cluster's for the zone, else the table's.

    None when neither a zone nor a number was given. `cluster` holds numbers by the table's codes. Raises UnknownZone.
    """
    if override is not None:
        return Intensity(override, "carbonPolicy.gramsPerKilowattHour", zone)
    if zone is None:
        return None
    found = find(zone)
    if cluster and found.code in cluster:
        return Intensity(cluster[found.code], f"this cluster's own figure for {found.code}", found.code)
    return found.intensity
