"""Live carbon intensity: recorded answers over a loopback server, answers that are nonsense, settings, and what is used
instead."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from operator_cases import Scene
from trireme_api.carbon.policy import CarbonPolicy
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.grid import Grid, Live, known
from trireme_operator.observe.gridwatch import BadSettings, GridWatch, provider_of, read_settings
from trireme_operator.observe.providers import CarbonAwareSdk, ElectricityMaps, Provider, ProviderError, WattTime

NOW = seconds("2026-11-29T12:20:00Z") or 0.0
# Answers in the form the providers document, with the figures of our choice.
ELECTRICITY_MAPS = {
    "zone": "SE-SE3", "carbonIntensity": 32, "datetime": "2026-11-29T12:00:00.000Z",
    "updatedAt": "2026-11-29T12:06:14.002Z", "createdAt": "2026-11-26T12:08:00.000Z", "emissionFactorType": "lifecycle",
    "isEstimated": True, "estimationMethod": "TIME_SLICER_AVERAGE", "temporalGranularity": "hourly",
}  # fmt: skip
WATTTIME = {
    "data": [{"point_time": "2026-11-29T12:20:00+00:00", "value": 870.0}],
    "meta": {
        "data_point_period_seconds": 300, "region": "CAISO_NORTH", "units": "lbs_co2_per_mwh",
        "generated_at": "2026-11-29T12:20:00+00:00", "signal_type": "co2_moer", "model": {"date": "2023-03-01"},
    },
}  # fmt: skip
CARBON_AWARE = [
    {"location": "westus", "time": "2026-11-29T11:55:00+00:00", "rating": 510.0, "duration": "00:05:00"},
    {"location": "westus", "time": "2026-11-29T12:15:00+00:00", "rating": 480.5, "duration": "00:05:00"},
]
Serve = Callable[[Callable[[web.Request], Any]], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners: list[web.AppRunner] = []

    async def start(answer: Callable[[web.Request], Any]) -> str:
        async def handle(request: web.Request) -> web.StreamResponse:
            found = answer(request)
            return found if isinstance(found, web.StreamResponse) else web.json_response(found)

        application = web.Application()
        application.router.add_get("/{path:.*}", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def ask(provider: Provider, zone: str) -> tuple[float, float]:
    async with aiohttp.ClientSession() as session:
        return await provider.latest(session, zone, NOW)


async def test_electricity_maps(serve: Serve) -> None:
    asked = []

    def answer(request: web.Request) -> Any:
        asked.append((request.path, dict(request.query), request.headers.get("auth-token")))
        return ELECTRICITY_MAPS

    url = await serve(answer)
    assert await ask(ElectricityMaps("secret", url), "SE-SE3") == (32, NOW - 1200)
    assert asked == [("/v3/carbon-intensity/latest", {"zone": "SE-SE3"}, "secret")]


async def test_watttime_logs_in_and_again_when_its_token_has_aged(serve: Serve) -> None:
    logins, tokens = [], iter(["one", "two"])

    def answer(request: web.Request) -> Any:
        if request.path == "/login":
            logins.append(request.headers["Authorization"])
            return {"token": next(tokens)}
        assert dict(request.query) == {"region": "CAISO_NORTH", "signal_type": "co2_moer", "horizon_hours": "0"}
        if request.headers["Authorization"] == "Bearer one" and len(logins) == 1 and asked:
            return web.json_response({"error": "expired"}, status=401)
        asked.append(1)
        return WATTTIME

    asked: list[int] = []
    provider = WattTime("user", "password", await serve(answer))
    assert not provider.average
    for _ in range(2):
        grams, at = await ask(provider, "CAISO_NORTH")
        assert (grams, at) == (pytest.approx(394.63, abs=0.01), NOW), "870 lb/MWh"
    assert logins == ["Basic dXNlcjpwYXNzd29yZA=="] * 2


async def test_carbon_aware_sdk_takes_the_newest(serve: Serve) -> None:
    url = await serve(lambda request: CARBON_AWARE if request.query["location"] == "westus" else [])
    assert await ask(CarbonAwareSdk(url), "westus") == (480.5, NOW - 300)
    with pytest.raises(ProviderError, match="mars"):
        await ask(CarbonAwareSdk(url), "mars")


NONSENSE = [
    ({"carbonIntensity": None}, "no number"),
    ({"carbonIntensity": "32"}, "no number"),
    ({"carbonIntensity": True}, "no number"),
    ({"carbonIntensity": -4}, "cannot be"),
    ({"carbonIntensity": 320000}, "cannot be"),
    ({"datetime": "yesterday"}, "RFC 3339"),
    ({"datetime": 5}, "RFC 3339"),
    ({"datetime": "2026-12-24T12:00:00Z"}, "future"),
    ({"zone": "PL"}, "told of 'PL'"),
]


@pytest.mark.parametrize(("change", "message"), NONSENSE)
async def test_an_answer_that_cannot_be_is_refused_by_name(serve: Serve, change: Any, message: str) -> None:
    url = await serve(lambda request: {**ELECTRICITY_MAPS, **change})
    with pytest.raises(ProviderError, match=message):
        await ask(ElectricityMaps("secret", url), "SE-SE3")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: web.Response(text="<html>"), "no JSON"),
        (lambda: web.Response(text='{"carbonIntensity": NaN, "zone": "SE-SE3"}'), "no number"),
        (lambda: web.Response(text="x" * 2_000_000), "longer"),
        (lambda: web.json_response([]), "has no `zone`"),
        (lambda: web.json_response({}, status=401), "Secret"),
        (lambda: web.json_response({}, status=500), "HTTP 500"),
        (lambda: web.Response(status=302, headers={"Location": "http://169.254.169.254/"}), "HTTP 302"),
    ],
)
async def test_what_is_no_answer(serve: Serve, answer: Callable[[], web.Response], message: str) -> None:
    url = await serve(lambda request: answer())
    with pytest.raises(ProviderError, match=message) as caught:
        await ask(ElectricityMaps("secret", url), "SE-SE3")
    assert "secret" not in str(caught.value)


async def test_nobody_there() -> None:
    with pytest.raises(ProviderError, match="ClientConnector"):
        await ask(ElectricityMaps("secret", "http://127.0.0.1:9"), "SE")


# --- settings and watch ---------------------------------------------------------------------------------------------


def files(folder: Path, settings: Any, **secrets: str) -> tuple[Path, Path]:
    path, hidden = folder / "settings.yaml", folder / "secrets"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    hidden.mkdir(exist_ok=True)
    for name, text in secrets.items():
        (hidden / name).write_text(text + "\n")
    return path, hidden


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"provider": "oracle"}, "provider"),
        ({"zones": {"ZZ": {}}}, "no grid intensity known for 'ZZ'"),
        ({"defaultZone": "ZZ"}, "no grid intensity known"),
        ({"zones": {"SE": {"gramsPerKilowattHour": -1}}}, "zones.SE.gramsPerKilowattHour"),
        ({"refreshSeconds": 1}, "refreshSeconds"),
        ({"provider": "carbon-aware-sdk"}, "url"),
        ({"url": "file:///etc/passwd"}, "url"),
        ({"colour": "green"}, "colour: unknown field"),
        ("[", "no YAML"),
        ({"provider": "electricity-maps"}, "'token' in the Secret"),
        ({"provider": "watttime"}, "'username'"),
    ],
)
def test_settings_that_are_wrong_are_told_and_the_table_stands(tmp_path: Path, settings: Any, message: str) -> None:
    path, hidden = files(tmp_path, settings)
    with pytest.raises(BadSettings, match=message):
        provider_of(read_settings(path), hidden)
    watch = GridWatch(path, hidden)
    watch.read()
    found = known(CarbonPolicy(zone="SE"), watch.grid, NOW)
    assert found.reported is not None
    assert found.reported.grams_per_kilowatt_hour == 40.7
    assert message.split("'")[0].strip() in found.trouble


def test_no_settings_is_no_trouble(tmp_path: Path) -> None:
    watch = GridWatch(tmp_path / "none.yaml", tmp_path / "nothing")
    watch.read()
    assert watch.grid == Grid(max_age_seconds=watch.grid.max_age_seconds)


async def test_a_provider_that_dies_gives_way_to_the_table_and_says_so(serve: Serve, tmp_path: Path) -> None:
    now, dead = [NOW], [False]
    url = await serve(lambda request: web.Response(status=503) if dead[0] else ELECTRICITY_MAPS)
    settings = {"provider": "electricity-maps", "url": url, "zones": {"SWE": {"providerZone": "SE-SE3"}}}
    watch = GridWatch(*files(tmp_path, settings, token="secret"), clock=lambda: now[0])
    policy = CarbonPolicy(zone="SE")
    async with aiohttp.ClientSession() as session:
        assert await watch.refresh(session, ["SE"]) == {"SE"}
        found = known(policy, watch.grid, now[0])
        assert found.reported == found.signal
        assert found.reported is not None
        assert found.reported.grams_per_kilowatt_hour == 32
        assert "Electricity Maps, SE-SE3 at 2026-11-29T12:00" in found.reported.source
        assert await watch.refresh(session, ["SE"]) == set(), "nothing new, nobody is woken"

        dead[0] = True
        assert await watch.refresh(session, ["SE"]) == {"SE"}
        fresh = known(policy, watch.grid, now[0])
        assert (fresh.reported, fresh.trouble) == (found.reported, ""), "the newest figure is fresh enough still"
        now[0] += 7200
        old = known(policy, watch.grid, now[0])
        assert old.reported is not None
        assert old.reported.grams_per_kilowatt_hour == 40.7
        assert "HTTP 503" in old.trouble

        dead[0], now[0] = False, NOW
        await watch.refresh(session, ["SE"])
        assert known(policy, watch.grid, now[0]) == found


async def test_settings_are_read_again_when_they_change(serve: Serve, tmp_path: Path) -> None:
    path, hidden = files(tmp_path, {"zones": {"DE": {"gramsPerKilowattHour": 50}}, "defaultZone": "DE"})
    watch = GridWatch(path, hidden)
    watch.read()
    before = known(CarbonPolicy(), watch.grid, NOW).reported
    assert before is not None
    assert before.grams_per_kilowatt_hour == 50
    files(tmp_path, {"defaultZone": "DE"})
    async with aiohttp.ClientSession() as session:
        assert await watch.refresh(session, ["DE"]) == {"DE"}
    after = known(CarbonPolicy(), watch.grid, NOW).reported
    assert after is not None
    assert after.grams_per_kilowatt_hour == pytest.approx(381, abs=0.2)


def test_what_a_report_and_what_a_schedule_goes_by() -> None:
    marginal = Grid(live={"SE": Live(300.0, NOW, False, "WattTime")})
    found = known(CarbonPolicy(zone="SE"), marginal, NOW)
    assert found.reported is not None
    assert found.signal is not None
    assert (found.reported.grams_per_kilowatt_hour, found.signal.grams_per_kilowatt_hour) == (40.7, 300.0)
    average = Grid({"SE": 9.0}, live={"SE": Live(300.0, NOW, True, "Electricity Maps")})
    found = known(CarbonPolicy(zone="SE"), average, NOW)
    assert found.reported is not None
    assert found.reported.grams_per_kilowatt_hour == 9.0, "what the cluster says of itself goes before"
    assert known(CarbonPolicy(), Grid(), NOW).signal is None
    own = known(CarbonPolicy(zone="hall-3", grams_per_kilowatt_hour=12), average, NOW)
    assert own.reported is not None
    assert (own.reported, own.reported.grams_per_kilowatt_hour) == (own.signal, 12)


def test_the_job_says_that_a_figure_is_missing_and_when_it_is_back() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"})
    scene.grid = Grid(troubles={"SE": "Electricity Maps: HTTP 503"})
    scene.settle()
    (found,) = (item for item in scene.status.conditions if item.type == "IntensityFallback")
    assert found.status == "True"
    assert "HTTP 503" in found.message
    assert "2023 is used instead" in found.message
    assert scene.notes.count("NoLiveIntensity") == 1
    scene.grid = Grid(live={"SE": Live(30.0, scene.now, True, "Electricity Maps, SE")})
    scene.settle()
    (found,) = (item for item in scene.status.conditions if item.type == "IntensityFallback")
    assert found.status == "False"
    assert scene.status.carbon.grams_per_kilowatt_hour == 30.0
