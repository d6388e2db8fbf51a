"""Lease, certificates, identity, options, logs, health and metrics, each without a server."""

from __future__ import annotations

import asyncio
import copy
import datetime
import json
import logging
import ssl
import time
from typing import Any

import pytest
from operator_cases import Scene, heard, manifest
from trireme_api.protocol import AgentState, Progress
from trireme_operator.act.api import ApiError, once_reachable
from trireme_operator.aside import Aside
from trireme_operator.leader import STUCK_SECONDS, Leader, LeadershipLost
from trireme_operator.logs import JsonFormatter, TextFormatter
from trireme_operator.observe.store import Store
from trireme_operator.options import BadOptions, parse
from trireme_operator.serve import certificates
from trireme_operator.serve.health import Health
from trireme_operator.serve.identity import Identity, Reviewer, identity_of
from trireme_operator.serve.metrics import JobCollector, Metrics

TODAY = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)


class FakeApi:
    """A few objects with resourceVersions; enough for what reads and writes one object at a time."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.version = 0
        self.down = False
        self.reviews: list[dict[str, Any]] = []

    def _stamp(self, obj: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        obj = copy.deepcopy(obj)
        obj["metadata"]["resourceVersion"] = str(self.version)
        return obj

    def _reach(self) -> None:
        if self.down:
            raise ApiError(0, "unreachable")

    async def get(self, path: str) -> dict[str, Any]:
        self._reach()
        if path not in self.objects:
            raise ApiError(404, "not found")
        return copy.deepcopy(self.objects[path])

    async def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._reach()
        if body["kind"] == "TokenReview":
            return {"status": self.reviews.pop(0)}
        where = f"{path}/{body['metadata']['name']}"
        if where in self.objects:
            raise ApiError(409, "exists", "AlreadyExists")
        self.objects[where] = self._stamp(body)
        return copy.deepcopy(self.objects[where])

    async def update(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._reach()
        if self.objects[path]["metadata"]["resourceVersion"] != body["metadata"].get("resourceVersion"):
            raise ApiError(409, "changed", "Conflict")
        self.objects[path] = self._stamp(body)
        return copy.deepcopy(self.objects[path])


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def leader(api: FakeApi, name: str, clock: Clock) -> Leader:
    return Leader(api, "ns", "lease", name, duration=15.0, clock=clock)  # type: ignore[arg-type]


# --- lease ----------------------------------------------------------------------------------------------------------


async def test_one_leads_and_the_other_waits_for_the_whole_lease() -> None:
    api, ours, theirs = FakeApi(), Clock(), Clock(5000.0)
    first, second = leader(api, "first", ours), leader(api, "second", theirs)
    assert await first.attempt()
    assert first.leading
    assert not await second.attempt()
    theirs.now += 14
    assert not await second.attempt()
    theirs.now += 2
    assert await second.attempt(), "not renewed for longer than it lasts, by the waiting one's own clock"
    assert second.transitions == 1


async def test_the_fence_falls_before_anyone_else_can_lead() -> None:
    api, clock = FakeApi(), Clock()
    first, second = leader(api, "first", clock), leader(api, "second", clock)
    await first.attempt()
    await second.attempt()
    for _ in range(200):
        clock.now += 0.1
        if await second.attempt():
            break
        assert not (first.leading and second.leading)
    assert second.leading
    assert not first.leading


async def test_a_renewal_that_was_slow_counts_from_its_beginning() -> None:
    api, clock = FakeApi(), Clock()
    first = leader(api, "first", clock)
    get = api.get

    async def slow(path: str) -> dict[str, Any]:
        clock.now += 9.9
        return await get(path)

    await first.attempt()
    api.get = slow  # type: ignore[method-assign]
    assert await first.attempt()
    clock.now += 0.2
    assert not first.leading


async def test_a_leader_that_cannot_reach_the_server_gives_up() -> None:
    api, clock = FakeApi(), Clock()
    first = leader(api, "first", clock)
    first._pause = 0.0
    await first.attempt()
    api.down = True

    async def sleep_on(path: str) -> dict[str, Any]:
        clock.now += 1
        raise ApiError(0, "unreachable")

    api.get = sleep_on  # type: ignore[method-assign]
    with pytest.raises(LeadershipLost):
        await first.keep()
    assert not first.leading


async def test_a_released_lease_is_taken_at_once() -> None:
    api, clock = FakeApi(), Clock()
    first, second = leader(api, "first", clock), leader(api, "second", clock)
    await first.attempt()
    assert not await second.attempt()
    await first.release()
    assert not first.leading
    assert await second.attempt()


@pytest.mark.parametrize("lives", [True, False])
async def test_a_main_loop_that_is_stuck_loses_the_lease(lives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    api, clock = FakeApi(), Clock()
    first = leader(api, "first", clock)
    began, waited = clock.now, asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > began + 3 * STUCK_SECONDS:
            raise asyncio.CancelledError
        if lives:
            first.alive()
        await waited(0)

    monkeypatch.setattr("trireme_operator.leader.asyncio.sleep", sleep)
    assert await first.attempt()
    with pytest.raises(asyncio.CancelledError if lives else LeadershipLost):
        await first.keep()
    assert first.leading is lives
    if not lives:
        assert STUCK_SECONDS < clock.now - began < STUCK_SECONDS + first._duration, "nor does it go at once"


@pytest.mark.parametrize("apart", [True, False])
async def test_a_main_loop_that_is_busy_keeps_the_lease(apart: bool) -> None:
    """Not so where both share a loop."""
    first = Leader(FakeApi(), "ns", "lease", "first", duration=0.6)  # type: ignore[arg-type]
    led = asyncio.Event()
    with Aside("lease") as aside:
        part = first.lead(lambda: loop.call_soon_threadsafe(led.set))
        loop = asyncio.get_running_loop()
        keeping = asyncio.ensure_future(aside.run(part) if apart else part)
        await led.wait()
        time.sleep(1.2)
        assert first.leading is apart
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await aside.run(first.release())
    assert not first.leading


async def test_what_ends_aside_ends_here() -> None:
    api, clock = FakeApi(), Clock()
    first, thief = leader(api, "first", clock), leader(api, "thief", clock)
    first._pause = 0.01
    with Aside("lease") as aside:
        led = asyncio.Event()
        loop = asyncio.get_running_loop()
        keeping = asyncio.ensure_future(aside.run(first.lead(lambda: loop.call_soon_threadsafe(led.set))))
        await led.wait()
        path = next(iter(api.objects))
        api.objects[path]["spec"]["holderIdentity"] = thief.identity
        with pytest.raises(LeadershipLost):
            await asyncio.wait_for(keeping, 5.0)


async def test_a_server_that_is_silent_is_asked_again_in_time() -> None:
    api = FakeApi()
    first = Leader(api, "ns", "lease", "first", duration=0.6)  # type: ignore[arg-type]
    assert await first.attempt()
    get, hung = api.get, [True]

    async def hang_once(path: str) -> dict[str, Any]:
        if hung.pop() if hung else False:
            await asyncio.Event().wait()
        return await get(path)

    api.get = hang_once  # type: ignore[method-assign]
    assert not await first.attempt()
    assert first.leading
    assert await first.attempt()


# --- certificates ---------------------------------------------------------------------------------------------------


async def test_replicas_share_one_authority() -> None:
    api = FakeApi()
    one = await certificates.authorities(api, "ns", "ca", TODAY)  # type: ignore[arg-type]
    two = await certificates.authorities(api, "ns", "ca", TODAY)  # type: ignore[arg-type]
    assert [a.pem for a in one] == [a.pem for a in two]
    assert "BEGIN CERTIFICATE" in certificates.bundle(one)


async def test_an_authority_is_followed_a_year_before_it_ends() -> None:
    api = FakeApi()
    (old,) = await certificates.authorities(api, "ns", "ca", TODAY)  # type: ignore[arg-type]
    later = TODAY + datetime.timedelta(days=certificates.CA_DAYS - 300)
    both = await certificates.authorities(api, "ns", "ca", later)  # type: ignore[arg-type]
    assert len(both) == 2
    assert certificates.signing(both, later).pem == old.pem, "pods that run know only the old one"
    last = TODAY + datetime.timedelta(days=certificates.CA_DAYS - 10)
    left = await certificates.authorities(api, "ns", "ca", last)  # type: ignore[arg-type]
    assert certificates.signing(left, last).pem != old.pem


async def test_a_garbled_secret_is_made_anew() -> None:
    api = FakeApi()
    await certificates.authorities(api, "ns", "ca", TODAY)  # type: ignore[arg-type]
    (path,) = api.objects
    api.objects[path]["data"] = {"ca-0.crt": "bm90IGEgY2VydA==", "ca-0.key": "eA=="}
    assert len(await certificates.authorities(api, "ns", "ca", TODAY)) == 1  # type: ignore[arg-type]


def handshake(hosts: list[str], asked: str, ca: str, authority: certificates.Authority, now: datetime.datetime) -> None:
    server = certificates.server_context()
    certificates.load_into(server, *certificates.make_serving(authority, hosts, now))
    client = ssl.create_default_context(cadata=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=asked),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_a_serving_certificate_is_good_for_its_addresses_only() -> None:
    now = datetime.datetime.now(datetime.UTC)
    authority, stranger = certificates.make_authority(now), certificates.make_authority(now)
    hosts = ["10.96.0.20", "trireme-coordinator.trireme-system.svc"]
    for host in hosts:
        handshake(hosts, host, authority.pem, authority, now)
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        handshake(hosts, "10.96.0.21", authority.pem, authority, now)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(hosts, hosts[0], stranger.pem, authority, now)


# --- identity -------------------------------------------------------------------------------------------------------


def review(**changes: Any) -> dict[str, Any]:
    extra = {
        "authentication.kubernetes.io/pod-name": ["job-0-1"],
        "authentication.kubernetes.io/pod-uid": ["p"],
        **changes.pop("extra", {}),
    }
    user = {"username": "system:serviceaccount:ns:default", "extra": extra, **changes.pop("user", {})}
    return {"authenticated": True, "audiences": ["trireme"], "user": user, **changes}


NOBODY = {
    "not authenticated": review(authenticated=False),
    "another audience": review(audiences=["https://kubernetes.default.svc"]),
    "a server that knows no audiences": {k: v for k, v in review().items() if k != "audiences"},
    "a person": review(user={"username": "alice"}),
    "bound to no pod": review(extra={"authentication.kubernetes.io/pod-name": []}),
    "bound to two": review(extra={"authentication.kubernetes.io/pod-uid": ["p", "q"]}),
    "nothing": {},
}


@pytest.mark.parametrize("case", NOBODY)
def test_who_is_nobody(case: str) -> None:
    assert identity_of(NOBODY[case]) is None


async def test_an_answer_is_kept_for_a_while_and_a_refusal_shortly() -> None:
    api, clock = FakeApi(), Clock()
    reviewer = Reviewer(api, clock)  # type: ignore[arg-type]
    api.reviews = [review(), {"authenticated": False}, review(), review()]
    assert await reviewer.identify("good") == Identity("ns", "job-0-1", "p")
    assert await reviewer.identify("bad") is None
    assert await reviewer.identify("good") is not None
    assert len(api.reviews) == 2, "nobody was asked again"
    clock.now += 11
    assert await reviewer.identify("bad") is not None
    clock.now += 61
    await reviewer.identify("good")
    assert not api.reviews
    assert await reviewer.identify("") is None
    assert await reviewer.identify("x" * 20_000) is None


# --- options, logs, health, metrics ---------------------------------------------------------------------------------

URL = ("--coordinator-url", "https://c:1")


def test_options_from_flags_and_environment() -> None:
    found = parse([*URL, "--namespaces", "a, b"], {"TRIREME_TRAINER_IMAGE": "t:2", "POD_NAME": "op-1"})
    assert (found.namespaces, found.trainer_image, found.identity) == (("a", "b"), "t:2", "op-1")
    service = {"TRIREME_COORDINATOR_SERVICE_HOST": "10.96.0.20", "TRIREME_COORDINATOR_SERVICE_PORT": "8443"}
    assert parse([], service).coordinator_url == "https://10.96.0.20:8443"
    assert (
        parse([], {**service, "TRIREME_COORDINATOR_SERVICE_HOST": "fd00::1"}).coordinator_url
        == "https://[fd00::1]:8443"
    )
    assert parse(URL, {}).identity != parse(URL, {}).identity, "two replicas must never share a name"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--workers", "0"), "--workers"),
        (("--qps", "many"), "--qps"),
        (("--metrics-port", "70000"), "--metrics-port"),
        (("--log-format", "xml"), "--log-format"),
        (("--image-pull-policy", "Sometimes"), "--image-pull-policy"),
    ],
)
def test_a_bad_option_is_named(flags: tuple[str, ...], named: str) -> None:
    with pytest.raises(BadOptions, match=named):
        parse([*URL, *flags], {})


@pytest.mark.parametrize(("text", "watched"), [("", True), ("true", True), ("False", False), ("false", False)])
def test_a_switch_in_the_environment(text: str, watched: bool) -> None:
    assert parse(URL, {"TRIREME_WATCH_NODES": text}).watch_nodes is watched
    assert parse([*URL, "--no-watch-nodes"], {"TRIREME_WATCH_NODES": text}).watch_nodes is False
    with pytest.raises(BadOptions, match="TRIREME_WATCH_NODES"):
        parse(URL, {"TRIREME_WATCH_NODES": "off"})


def test_no_way_to_be_reached_is_told() -> None:
    with pytest.raises(BadOptions, match="trireme-coordinator"):
        parse(["--own-namespace", "nowhere.invalid"], {})


def test_log_lines() -> None:
    record = logging.makeLogRecord({"msg": "two\nlines", "levelname": "INFO", "name": "x", "job": "ns/a"})
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["job"], line["level"]) == ("two\nlines", "ns/a", "info")
    text = TextFormatter().format(record)
    assert "\n" not in text
    assert "job=ns/a" in text


def test_liveness_means_something() -> None:
    clock, age = Clock(), Clock(0.0)
    health = Health(age, clock)
    health.event("pods")
    assert health.ailments() == []
    for _ in range(3):
        clock.now += 60
        health.listed("pods", 1)
    assert "watch of pods" in health.ailments()[0]
    health.event("pods")
    assert health.ailments() == []
    clock.now += 10_000
    for _ in range(9):
        health.listed("pods", 0)
    assert health.ailments() == [], "a quiet watch of a quiet cluster is well"
    age.now = 500
    assert "queue" in health.ailments()[0]
    assert health.unready()
    health.synced = health.serving = True
    assert health.unready() == []


def test_series_of_a_job_go_with_it() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}).run()
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING, scene.now, progress=Progress(7, loss=2.5, mfu=0.4))
    scene.settle()
    store, metrics = Store(), Metrics()
    metrics.registry.register(JobCollector(store))
    store.put_job(scene.obj)
    value = metrics.registry.get_sample_value
    names = {"namespace": "ns", "job": "job"}
    assert value("trireme_job_step", names) == 7
    assert value("trireme_job_loss", names) == 2.5
    assert value("trireme_job_mfu", names) == 0.4
    assert value("trireme_job_phase", {**names, "phase": "Running"}) == 1
    assert value("trireme_job_phase", {**names, "phase": "Failed"}) == 0
    assert value("trireme_job_info", {**names, "uid": "uid", "model": "", "checkpoint": "", "zone": "SE"}) == 1
    assert value("trireme_job_restarts_total", {**names, "kind": "process"}) == 0
    assert value("trireme_job_model_tflops", names) is None, "not known is not 0"
    store.drop_job(("ns", "job"), "uid", 0.0)
    left = [s for family in metrics.registry.collect() for s in family.samples if s.labels.get("job")]
    assert left == []


def test_each_part_of_a_recovery_is_observed_once() -> None:
    scene = Scene().run()
    metrics = Metrics()
    before = scene.job
    del scene.pods["pod-0-1"]
    scene.settle()
    for _ in range(3):
        metrics.status_written(before, scene.job)
        before = scene.job
    assert metrics.registry.get_sample_value("trireme_recovery_seconds_count", {"phase": "decide"}) == 1
    assert manifest()["kind"] == "TrainingJob"


def test_an_operator_waits_for_an_api_server_that_is_away_and_not_for_one_that_refuses() -> None:
    answers: list[object] = [ApiError(0, "connection refused"), ApiError(503, "starting"), "there"]
    calls = 0

    async def call() -> object:
        nonlocal calls
        calls += 1
        answer = answers[calls - 1]
        if isinstance(answer, ApiError):
            raise answer
        return answer

    assert asyncio.run(once_reachable(call, pause=0.0)) == "there"
    assert calls == 3
    answers[:], calls = [ApiError(403, "forbidden")], 0
    with pytest.raises(ApiError, match="forbidden"):
        asyncio.run(once_reachable(call, pause=0.0))
