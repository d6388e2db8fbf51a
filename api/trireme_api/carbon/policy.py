"""spec.carbonPolicy: where the job draws its power, and what is assumed of the hardware."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from trireme_api.carbon.footprint import PUE
from trireme_api.carbon.grid import MAX_GRAMS_PER_KILOWATT_HOUR
from trireme_api.schema import PositiveFloat, Spec, Status


class CarbonPolicy(Spec):
    zone: str | None = Field(default=None, max_length=32)
    """Zone of the grid for the average intensity of the shipped table: a country (ISO 3166 alpha-2 or alpha-3), a state
    of the USA such as US-CA, or WORLD."""
    grams_per_kilowatt_hour: float | None = Field(default=None, ge=0, le=MAX_GRAMS_PER_KILOWATT_HOUR)
    """Overrides the table."""
    pue: float = Field(default=PUE, ge=1.0, le=5.0)
    """Power usage effectiveness of the building; 1.1 as in Sustainable AI (2111.00364)."""
    cpu_watts_per_core: PositiveFloat = 7.5
    """Declared model used where no counter can be read; a reading made with it is labelled `declared`."""

    @field_validator("zone", mode="before")
    @classmethod
    def _norway(cls, zone: Any) -> Any:
        if zone is False:
            raise ValueError('YAML reads an unquoted NO as false; write "NO" or NOR')
        return zone


class EnergyStatus(Status):
    joules: float = 0.0
    source: str = "missing"
    """nvml | nvml-power | rapl | declared | missing; the weakest of the components that have a number."""
    by_pod: dict[str, float] = Field(default_factory=dict)
    """Joules of each live pod, so that a counter is added once; ended pods are in joules only."""


class CarbonStatus(Status):
    grams: float | None = None
    """Operational CO2e: energy × PUE × grid intensity; absent where the intensity or the energy is not known."""
    grams_per_kilowatt_hour: float | None = None
    pue: float | None = None
    source: str | None = None
    summary: str | None = None
    """For the printer column, with its unit."""
