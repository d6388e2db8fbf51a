"""spec.carbonPolicy: where the job draws its power, and what is assumed of the hardware; and the figures in status."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from trireme_api.carbon.footprint import LIFE_YEARS, PUE, UTILISATION, Mode
from trireme_api.carbon.grid import MAX_GRAMS_PER_KILOWATT_HOUR
from trireme_api.schema import PositiveFloat, Spec, Status


class Embodied(Spec):
    """How what the hardware cost to make is shared out. Both ways are in status; `mode` says which is added up."""

    mode: Mode = "calendar"
    """calendar: by the years of life (SCI). busy: by the hours of it in use (Sustainable AI, 2111.00364)."""
    life_years: float = Field(default=LIFE_YEARS, gt=0, le=20)
    utilization: float = Field(default=UTILISATION, gt=0, le=1)
    """Share of its life that the hardware is in use; for `busy`."""
    gpu_kilograms: float | None = Field(default=None, ge=0, le=100_000)
    """CO2e of making one GPU; left out: the range of the shipped table for the model that the driver names."""
    host_kilograms: float | None = Field(default=None, ge=0, le=1_000_000)
    """The same of everything else in one machine."""


class CarbonPolicy(Spec):
    zone: str | None = Field(default=None, max_length=32)
    """Zone of the grid for the average intensity of the shipped table: a country (ISO 3166 alpha-2 or alpha-3), a state
    of the USA such as US-CA, or WORLD."""
    grams_per_kilowatt_hour: float | None = Field(default=None, ge=0, le=MAX_GRAMS_PER_KILOWATT_HOUR)
    """Overrides the table."""
    pue: float = Field(default=PUE, ge=1.0, le=5.0)
    """Power usage effectiveness of the building; 1.1 as in Sustainable AI (2111.00364)."""
    cpu_watts_per_core: PositiveFloat = 7.5
    """Of a busy core; used where no counter can be read. What is reckoned so is labelled `declared`. Read when a pod is
    made, as are the next two."""
    dram_watts_per_gigabyte: float = Field(default=0.375, ge=0, le=100)
    """The same of memory in use; 3 W for 8 GB as in codecarbon 2."""
    gpu_watts: PositiveFloat | None = None
    """The same of one GPU, for GPUs that tell neither energy nor power; left out: their energy is missing."""
    embodied: Embodied = Embodied()
    start_below: float | None = Field(default=None, ge=0, le=MAX_GRAMS_PER_KILOWATT_HOUR)
    """g/kWh: does not start, or go on after a pause, while the grid is dirtier; at the latest at `deadline`."""
    pause_above: float | None = Field(default=None, gt=0, le=MAX_GRAMS_PER_KILOWATT_HOUR)
    """g/kWh: saves and gives its nodes back while the grid is dirtier; goes on exactly there at `startBelow`, or at
    nine tenths of this, and at the latest at `deadline`. Needs a checkpoint."""
    minimum_run_seconds: int = Field(default=1800, ge=0)
    """Runs so long at least before it pauses."""
    deadline: str | None = None
    """From this time (RFC 3339) on it neither waits nor pauses for the grid; required with either."""
    budget_grams: PositiveFloat | None = None
    """CO2e the job may cause, operational and embodied."""
    on_budget: Literal["warn", "suspend"] = "warn"
    """What happens beyond the budget: a condition and an event; suspend: it also saves and gives its nodes back."""

    @field_validator("deadline", mode="before")
    @classmethod
    def _with_a_zone(cls, value: Any) -> Any:
        """A time that YAML has already read is taken as one."""
        if value is None:
            return None
        try:
            at = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        except ValueError:
            at = None
        if at is None or at.tzinfo is None:
            raise ValueError("must be a time with its zone, such as 2026-12-01T00:00:00Z")
        return at.astimezone(UTC).isoformat().replace("+00:00", "Z")

    @field_validator("zone", mode="before")
    @classmethod
    def _norway(cls, zone: Any) -> Any:
        if zone is False:
            raise ValueError('YAML reads an unquoted NO as false; write "NO" or NOR')
        return zone

    def problems(self, saves: bool) -> Iterator[tuple[str, str]]:
        """(field, what would be right) of what does not go together; `saves`: the job has checkpoints."""
        if (self.start_below is not None or self.pause_above is not None) and self.deadline is None:
            yield "deadline", "is required with startBelow or pauseAbove, or the job could wait for ever"
        if self.pause_above is not None and self.start_below is not None and self.start_below >= self.pause_above:
            yield "pauseAbove", f"must be more than startBelow ({self.start_below:g})"
        if not saves and self.pause_above is not None:
            yield "pauseAbove", "needs spec.checkpoint, or each pause would cost the work done so far"
        if not saves and self.budget_grams is not None and self.on_budget == "suspend":
            yield "onBudget", "suspend needs spec.checkpoint, or the work done so far would be lost; use warn"


class CarbonHold(Status):
    """What carbonPolicy keeps the job from."""

    reason: str | None = None
    """DirtyGrid | CarbonBudgetSpent; absent: nothing."""
    since: str | None = None
    pauses: int = 0
    """How often a running gang has been asked to give its nodes back."""
    runs_since: str | None = None
    """When the gang was last admitted; the minimum run counts from here."""


class AttemptEnergy(Status):
    """What one attempt used, whether it went well, failed, or only waited."""

    attempt: int
    joules: dict[str, float] = Field(default_factory=dict)
    """By component: gpu, cpu, dram. One that could not be read is not there."""
    sources: dict[str, str] = Field(default_factory=dict)
    """By component, the weakest met: nvml | nvml-power | rapl | declared | missing."""
    idle_joules: float = 0.0
    """Of all of them: used while no rank ran in the pod, as at the barrier."""
    pod_seconds: float = 0.0
    """Of all its pods together, by the agents' clocks."""
    gpu_seconds: dict[str, float] = Field(default_factory=dict)
    """By model as the driver names it."""
    host_seconds: dict[str, float] = Field(default_factory=dict)
    """By kind of machine (gpu, cpu): pod seconds times the pod's share of its machine."""
    grams: float | None = None
    """Operational CO2e, each joule at the intensity of its hour."""
    unpriced_joules: float = 0.0
    """Joules counted while no intensity was known; priced when one is."""


class EnergyStatus(Status):
    joules: float = 0.0
    """Of all attempts."""
    source: str = "missing"
    """nvml | nvml-power | rapl | declared | missing; the weakest of the components that have a number."""
    missing: list[str] = Field(default_factory=list)
    """Components of which some energy could not be read: all sums are lower bounds then."""
    by_component: dict[str, float] = Field(default_factory=dict)
    """Joules: gpu, cpu, dram."""
    idle_joules: float = 0.0
    attempts: list[AttemptEnergy] = Field(default_factory=list)
    """The newest ones."""
    older: AttemptEnergy | None = None
    """All before them in one row, with the number of the newest among them."""
    pods: dict[str, dict[str, float]] = Field(default_factory=dict)
    """What was last counted of each live pod, by UID: joules by component, and `seconds`; so each is added once."""


class EmbodiedGrams(Status):
    low: float
    mid: float
    high: float


class CarbonStatus(Status):
    grams: float | None = None
    """Operational CO2e: energy × PUE × grid intensity; absent where the intensity or the energy is not known."""
    grams_per_kilowatt_hour: float | None = None
    """Now; what was used before was reckoned with the figure of its time."""
    pue: float | None = None
    source: str | None = None
    embodied: EmbodiedGrams | None = None
    """The hardware's share, by `carbonPolicy.embodied.mode`."""
    embodied_by_mode: dict[str, EmbodiedGrams] = Field(default_factory=dict)
    """calendar, busy"""
    total_grams: float | None = None
    """Operational and the middle of embodied."""
    grams_per_million_tokens: float | None = None
    """SCI (ISO/IEC 21031): operational and embodied per million tokens trained on, embodied by calendar as in SCI."""
    summary: str | None = None
    """The total for the printer column, with its unit; ≥ where some energy is missing."""
