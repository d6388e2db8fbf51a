"""Keeps what is known of the grids up to date: the cluster's settings and a live provider, asked again and again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import aiohttp
import yaml
from pydantic import Field, ValidationError
from trireme_api import carbon
from trireme_api.carbon.grid import MAX_GRAMS_PER_KILOWATT_HOUR
from trireme_api.schema import Spec, problems

from trireme_operator.decide.grid import Grid, Live
from trireme_operator.observe.providers import CarbonAwareSdk, ElectricityMaps, Provider, ProviderError, WattTime

log = logging.getLogger(__name__)
ProviderName = Literal["electricity-maps", "watttime", "carbon-aware-sdk"]
EVERYWHERE = "*"
LOOK_SECONDS = 2.0
_SECRETS = ("token", "username", "password")


class ZoneSettings(Spec):
    grams_per_kilowatt_hour: float | None = Field(default=None, ge=0, le=MAX_GRAMS_PER_KILOWATT_HOUR)
    """This cluster's own average, which goes before provider and table in reports."""
    provider_zone: str | None = Field(default=None, min_length=1, max_length=64)
    """What the provider calls it; left out: the same."""


class GridSettings(Spec):
    """The file that the ConfigMap `trireme-carbon` holds as `settings.yaml`."""

    default_zone: str | None = None
    """Of jobs that name none."""
    provider: ProviderName | None = None
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+(/[^\s]*)?$")
    """Of the provider; required for carbon-aware-sdk, which runs in your own cluster."""
    signal: Literal["average", "marginal"] = "marginal"
    """What carbon-aware-sdk answers, which depends on its own source; the other two are known."""
    refresh_seconds: float = Field(default=300, ge=30, le=86_400)
    max_age_seconds: float = Field(default=7200, ge=300, le=86_400)
    """An older figure is none."""
    zones: dict[str, ZoneSettings] = Field(default_factory=dict)


class BadSettings(ValueError):
    """One line: the field and what would be right."""


def read_settings(path: Path | None) -> GridSettings:
    """Defaults where there is no file. Raises BadSettings."""
    try:
        text = path.read_text(encoding="utf-8") if path is not None else ""
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(f"{path}: {error}") from None
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadSettings(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    try:
        found = GridSettings.model_validate(data)
    except ValidationError as error:
        raise BadSettings("; ".join(str(problem) for problem in problems(error))) from None
    try:
        zones = {carbon.find(name).code: zone for name, zone in found.zones.items()}
        default = carbon.find(found.default_zone).code if found.default_zone is not None else None
    except carbon.UnknownZone as error:
        raise BadSettings(f"zones, defaultZone: {error}") from None
    if found.provider == "carbon-aware-sdk" and found.url is None:
        raise BadSettings("url: is required with provider carbon-aware-sdk")
    return found.model_copy(update={"zones": zones, "default_zone": default})


def provider_of(settings: GridSettings, secrets: Path | None) -> Provider | None:
    """Raises BadSettings where a credential is missing."""

    def secret(name: str) -> str:
        try:
            text = (secrets / name).read_text(encoding="utf-8").strip() if secrets is not None else ""
        except (OSError, UnicodeDecodeError):
            text = ""
        if not text or any(ord(letter) < 33 for letter in text):
            raise BadSettings(f"provider: {settings.provider} needs the key {name!r} in the Secret trireme-carbon")
        return text

    url = {"url": settings.url.rstrip("/")} if settings.url is not None else {}
    if settings.provider == "electricity-maps":
        return ElectricityMaps(secret("token"), **url)
    if settings.provider == "watttime":
        return WattTime(secret("username"), secret("password"), **url)
    if settings.provider == "carbon-aware-sdk":
        return CarbonAwareSdk(url["url"], settings.signal == "average")
    return None


class GridWatch:
    """`grid` is replaced as a whole; readers never wait."""

    def __init__(
        self, settings: Path | None, secrets: Path | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings_path, self._secrets_path, self._clock = settings, secrets, clock
        self._settings = GridSettings()
        self._provider: Provider | None = None
        self._inputs: object = None
        self._said: dict[str, str] = {}
        self.grid = Grid()

    def read(self) -> None:
        """The files, which may be edited at any time; bad ones are told and the shipped table used."""
        inputs = [_content(self._settings_path)]
        inputs += [_content(self._secrets_path / name if self._secrets_path else None) for name in _SECRETS]
        if inputs == self._inputs:
            return
        self._inputs = inputs
        self._settings, self._provider, trouble = GridSettings(), None, ""
        try:
            self._settings = read_settings(self._settings_path)
            self._provider = provider_of(self._settings, self._secrets_path)
        except BadSettings as error:
            trouble = f"carbon settings: {error}"
        self._say(EVERYWHERE, trouble)
        settings = self._settings
        own = {
            code: zone.grams_per_kilowatt_hour
            for code, zone in settings.zones.items()
            if zone.grams_per_kilowatt_hour is not None
        }
        self.grid = Grid(
            own, settings.default_zone, {}, {EVERYWHERE: trouble} if trouble else {}, settings.max_age_seconds,
            self._provider.name if self._provider is not None else "",
        )  # fmt: skip

    async def refresh(self, session: aiohttp.ClientSession, zones: Iterable[str]) -> set[str]:
        """Asks for the zones that jobs are in; returns the codes whose figure or trouble has changed."""
        before = self.grid
        self.read()
        provider = self._provider
        wanted = {code for zone in zones if (code := _code(zone))}
        if provider is None:
            return wanted if self.grid != before else set()
        await asyncio.gather(*(self._ask(session, provider, code) for code in wanted))
        after = self.grid
        return {
            code
            for code in wanted
            if before.live.get(code) != after.live.get(code) or before.troubles.get(code) != after.troubles.get(code)
        }

    async def _ask(self, session: aiohttp.ClientSession, provider: Provider, code: str) -> None:
        name = self._settings.zones[code].provider_zone if code in self._settings.zones else None
        trouble, live = "", self.grid.live.get(code)
        try:
            grams, at = await provider.latest(session, name or code, self._clock())
            live = Live(grams, at, provider.average, f"{provider.name}, {name or code}")
        except ProviderError as error:
            trouble = f"{provider.name}: {error}"
        except Exception as error:  # or jobs would wait for an answer that never comes
            log.exception("carbon intensity of %s", code)
            trouble = f"{provider.name}: {type(error).__name__}"
        if provider is not self._provider:
            return  # the settings changed meanwhile
        self._say(code, trouble)
        troubles = {**self.grid.troubles, code: trouble}
        if not trouble:
            del troubles[code]
        lives = {**self.grid.live, code: live} if live is not None else self.grid.live
        self.grid = replace(self.grid, live=lives, troubles=troubles)

    def _say(self, where: str, trouble: str) -> None:
        if trouble and self._said.get(where) != trouble:  # every few minutes is too often to say the same
            log.warning("%s; the shipped table is used when the newest figure has aged", trouble)
        self._said[where] = trouble

    async def keep(self, zones: Callable[[], Iterable[str]], changed: Callable[[set[str]], None]) -> None:
        """Endless. Also looks again soon when a job in a new zone comes."""
        known: set[str] = set()
        due = 0.0
        async with aiohttp.ClientSession(trust_env=True) as session:
            while True:
                now, wanted = time.monotonic(), set(zones())
                if now >= due or wanted - known:
                    due, known = now + self._settings.refresh_seconds, wanted
                    try:
                        news = await self.refresh(session, wanted)
                    except Exception:
                        log.exception("carbon intensity")  # of no consequence to training
                        news = set()
                    if news:
                        changed(news)
                await asyncio.sleep(LOOK_SECONDS)




def _code(zone: str) -> str | None:
    try:
        return carbon.find(zone).code
    except carbon.UnknownZone:
        return None


def _content(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError:
        return None
