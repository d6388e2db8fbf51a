"""Live carbon intensity over HTTP: one interface, three providers. Their answers are checked, never believed."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import aiohttp
from trireme_api.carbon.footprint import GRAMS_PER_POUND

from trireme_operator.decide.clock import seconds

TIMEOUT_SECONDS = 10.0
MAX_ANSWER_BYTES = 1 << 20
MAX_GRAMS = 5000.0
"""Above any marginal plant: a larger number is a wrong unit."""
MAX_AHEAD_SECONDS = 7200.0
"""A figure may be of the hour that has just begun; one of tomorrow is a wrong clock."""


class ProviderError(Exception):
    """One line: what was wrong with the answer."""


class Provider(Protocol):
    name: str
    average: bool
    """Whether its figure is an average; marginal ones serve schedules only."""

    async def latest(self, session: aiohttp.ClientSession, zone: str, now: float) -> tuple[float, float]:
        """(g/kWh, the Unix time it is of) for the provider's own name of a zone. Raises ProviderError."""
        ...


class ElectricityMaps:
    name = "Electricity Maps"
    average = True

    def __init__(self, token: str, url: str = "https://api.electricitymaps.com") -> None:
        self._token, self._url = token, url

    async def latest(self, session: aiohttp.ClientSession, zone: str, now: float) -> tuple[float, float]:
        url = f"{self._url}/v3/carbon-intensity/latest"
        answer = await ask(session, url, {"zone": zone}, headers={"auth-token": self._token})
        told = _field(answer, "zone")
        if told != zone:
            raise ProviderError(f"asked for zone {zone!r}, was told of {told!r}")
        return _grams(_field(answer, "carbonIntensity")), _time(_field(answer, "datetime"), now)


class WattTime:
    name = "WattTime"
    average = False

    def __init__(self, user: str, password: str, url: str = "https://api.watttime.org") -> None:
        self._login, self._url = {"Authorization": aiohttp.encode_basic_auth(user, password)}, url
        self._token = ""

    async def latest(self, session: aiohttp.ClientSession, zone: str, now: float) -> tuple[float, float]:
        url = f"{self._url}/v3/forecast"
        query = {"region": zone, "signal_type": "co2_moer", "horizon_hours": "0"}
        if not self._token:
            await self._log_in(session)
        try:
            answer = await ask(session, url, query, headers={"Authorization": f"Bearer {self._token}"})
        except Unauthorized:  # a token lasts half an hour
            await self._log_in(session)
            answer = await ask(session, url, query, headers={"Authorization": f"Bearer {self._token}"})
        meta, points = _field(answer, "meta"), _field(answer, "data")
        if _field(meta, "units") != "lbs_co2_per_mwh":
            raise ProviderError(f"units are {_field(meta, 'units')!r}, not lbs_co2_per_mwh")
        if _field(meta, "region") != zone:
            raise ProviderError(f"asked for region {zone!r}, was told of {_field(meta, 'region')!r}")
        if not isinstance(points, list) or not points:
            raise ProviderError("`data` is empty")
        pounds = _field(points[0], "value")
        return _grams(pounds, GRAMS_PER_POUND / 1000), _time(_field(points[0], "point_time"), now)

    async def _log_in(self, session: aiohttp.ClientSession) -> None:
        token = _field(await ask(session, f"{self._url}/login", {}, self._login), "token")
        if not isinstance(token, str) or not token:
            raise ProviderError("`token` is no text")
        self._token = token


class CarbonAwareSdk:
    name = "Carbon Aware SDK"

    def __init__(self, url: str, average: bool = False) -> None:
        self._url, self.average = url, average

    async def latest(self, session: aiohttp.ClientSession, zone: str, now: float) -> tuple[float, float]:
        until = datetime.fromtimestamp(now, UTC)
        query = {
            "location": zone,
            "time": (until - timedelta(hours=2)).isoformat(timespec="seconds"),
            "toTime": until.isoformat(timespec="seconds"),
        }
        answer = await ask(session, f"{self._url}/emissions/bylocation", query)
        if not isinstance(answer, list) or not answer:
            raise ProviderError(f"no figures for location {zone!r} of the last two hours")
        found = [(_time(_field(one, "time"), now), _grams(_field(one, "rating"))) for one in answer]
        at, grams = max(found)
        return grams, at


class Unauthorized(ProviderError):
    pass


async def ask(
    session: aiohttp.ClientSession, url: str, query: dict[str, str], headers: dict[str, str] | None = None
) -> Any:
    """The JSON answer of a GET. Raises ProviderError; its text has no query and no secret in it."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    try:
        async with session.get(
            url, params=query, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            body = bytearray()
            async for chunk in response.content.iter_chunked(65_536):
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise ProviderError(f"{url}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
    except TimeoutError:
        raise ProviderError(f"{url}: no answer within {TIMEOUT_SECONDS:g} s") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise ProviderError(f"{url}: {type(error).__name__}") from None
    if response.status in (401, 403):
        raise Unauthorized(f"{url}: HTTP {response.status}; check the Secret with its credentials")
    if response.status != 200:
        raise ProviderError(f"{url}: HTTP {response.status}")
    try:
        return json.loads(bytes(body))
    except ValueError:
        raise ProviderError(f"{url}: the answer is no JSON") from None


def _field(answer: Any, name: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise ProviderError(f"the answer has no `{name}`")
    return answer[name]


def _grams(value: Any, factor: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ProviderError(f"intensity is {str(value)[:40]!r}, no number")
    grams = value * factor
    if not 0 <= grams <= MAX_GRAMS:
        raise ProviderError(f"an intensity of {grams:g} g/kWh cannot be")
    return round(grams, 2)


def _time(value: Any, now: float) -> float:
    at = seconds(value) if isinstance(value, str) else None
    if at is None:
        raise ProviderError(f"time is {str(value)[:40]!r}, not RFC 3339")
    if at > now + MAX_AHEAD_SECONDS:
        raise ProviderError(f"a figure of {value} is of the future")
    return min(at, now)
