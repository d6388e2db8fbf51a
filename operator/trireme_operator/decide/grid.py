"""Which carbon intensity a job is reckoned with, and which its schedule goes by. Pure.

Reported is an average, by location: the job's own number, the cluster's for the zone, a live average, the table.
A schedule goes by what is live, marginal or average, for only that moves; where nothing is, by the same as the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trireme_api import carbon
from trireme_api.carbon.policy import CarbonPolicy

from trireme_operator.decide.clock import stamp


@dataclass(frozen=True)
class Live:
    """The newest answer of a provider for a zone."""

    grams_per_kilowatt_hour: float
    at: float
    """The time it is of, by the provider's clock."""
    average: bool
    """False: marginal, which is no basis for a report."""
    source: str


@dataclass(frozen=True)
class Grid:
    """What is known of the grids; by zone code of the shipped table."""

    own: Mapping[str, float] = field(default_factory=dict)
    """The cluster's own averages."""
    default_zone: str | None = None
    live: Mapping[str, Live] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    """Why a provider that is set up has no answer; under `*` what concerns all zones."""
    max_age_seconds: float = 3600.0
    provider: str = ""
    """Name of the one that is set up."""


@dataclass(frozen=True)
class Known:
    reported: carbon.Intensity | None = None
    signal: carbon.Intensity | None = None
    trouble: str = ""
    """A live figure was to be had and is not: what is used instead is in the two above."""
    asking: str = ""
    """The provider that has yet to answer, or fail to, for the first time; until then no schedule goes by the table."""


def known(policy: CarbonPolicy, grid: Grid, now: float) -> Known:
    zone = policy.zone or grid.default_zone
    try:
        static = carbon.intensity(zone, policy.grams_per_kilowatt_hour, grid.own)
    except carbon.UnknownZone:
        # Refused by validation; only a job admitted by another version can come here.
        return Known()
    code = _code(zone)
    live = grid.live.get(code)
    trouble = grid.troubles.get(code) or grid.troubles.get("*", "")
    if live is not None and now - live.at > grid.max_age_seconds:
        trouble = trouble or f"the newest figure of {live.source} is of {stamp(live.at)}"
        live = None
    if live is None:
        asking = grid.provider if code and not trouble else ""
        return Known(static, None if asking else static, trouble, asking)
    current = carbon.Intensity(live.grams_per_kilowatt_hour, f"{live.source} at {stamp(live.at)}", code)
    fixed = policy.grams_per_kilowatt_hour is not None or code in grid.own
    # A trouble with a figure still fresh enough is none yet.
    return Known(static if fixed or not live.average else current, current, "")


def _code(zone: str | None) -> str:
    """Empty for none, and for a name of the job's own beside a number of its own."""
    try:
        return carbon.find(zone).code if zone is not None else ""
    except carbon.UnknownZone:
        return ""
