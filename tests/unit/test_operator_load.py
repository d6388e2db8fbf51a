"""An operator that is behind: whom the coordinator turns away, for how long, and what that costs neither of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from operator_cases import NOW, Scene, heard
from trireme_api.protocol import REPORT_PATH, AgentState, Report
from trireme_operator.decide.gang import Place
from trireme_operator.decide.views import Node
from trireme_operator.observe.store import Store
from trireme_operator.serve import health, load
from trireme_operator.serve.coordinator import Coordinator
from trireme_operator.serve.identity import Reviewer
from trireme_operator.serve.load import BEAT_SECONDS, Load
from trireme_operator.serve.metrics import Metrics

UID = "pod-0-1"
PATH = REPORT_PATH.format(namespace="ns", name="job", pod="job-0-1")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Reviews:
    """An API server that knows every token as that of one pod, once `go` is set."""

    asked: list[str] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def create(self, _: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body["spec"]["token"])
        await self.go.wait()
        extra = {"authentication.kubernetes.io/pod-name": ["job-0-1"], "authentication.kubernetes.io/pod-uid": [UID]}
        user = {"username": "system:serviceaccount:ns:default", "extra": extra}
        return {"status": {"authenticated": True, "audiences": ["trireme"], "user": user}}


class Desk:
    """A coordinator of one running job, its clock that of the load, and what is known there."""

    def __init__(self) -> None:
        self.clock, self.reviews, self.store = Clock(), Reviews(), Store()
        self.load = Load(self.clock)
        self.scene = Scene().run()
        self.store.put_job(self.scene.obj)
        self.store.pods.update(self.scene.pods)
        for name in self.scene.pods:
            self.store._by_job.setdefault(("ns", "job"), set()).add(name)
        self.store.heard[UID] = heard(UID, 1, AgentState.RUNNING, NOW)
        self.reviewer = Reviewer(self.reviews, self.clock)  # type: ignore[arg-type]
        self.reviews.go.set()

    def behind(self, seconds: float) -> None:
        self.load.beat()
        self.clock.now += BEAT_SECONDS + seconds

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Desk]:
        async def refresh(_: object) -> None: ...

        coordinator = Coordinator(
            self.store,
            self.reviewer,
            observe=lambda _: self.scene.seen(),
            mark=lambda key, after, patience: None,
            figures_due=lambda job: 1.0,
            refresh=refresh,
            leading=lambda: True,
            load=self.load,
            clock=lambda: NOW + self.clock.now,
        )
        async with TestClient(TestServer(coordinator.application())) as self.client:
            yield self

    async def report(self, token: str = "one", news: bool = False) -> tuple[int, str | None]:
        body = Report(UID, 1, AgentState.RUNNING).to_json()
        query = "wait=0&news=1" if news else "wait=0"
        headers = {"Authorization": f"Bearer {token}"}
        async with self.client.post(f"{PATH}?{query}", json=body, headers=headers) as answer:
            await answer.read()
            return answer.status, answer.headers.get("Retry-After")


def test_lateness_is_seen_at_once_and_forgotten_soon() -> None:
    clock = Clock()
    found = Load(clock)
    assert found.late == 0
    for _ in range(5):
        found.beat()
        clock.now += BEAT_SECONDS
    assert found.late == 0
    clock.now += 6.0
    assert found.late == pytest.approx(6.0), "before the next beat"
    found.beat()
    for expected in (3.0, 1.5, 0.75):
        clock.now += BEAT_SECONDS
        found.beat()
        assert found.late == pytest.approx(expected)


async def test_figures_are_turned_away_before_news() -> None:
    async with Desk().open() as desk:
        assert await desk.report() == (200, None)
        desk.behind(load.LATE_SECONDS + 1)
        assert await desk.report() == (503, "9")
        assert await desk.report(news=True) == (200, None)
        desk.behind(load.VERY_LATE_SECONDS + 1)
        assert await desk.report(news=True) == (503, "5")
        assert await desk.report() == (503, "15")


async def test_who_is_turned_away_is_not_looked_up() -> None:
    async with Desk().open() as desk:
        desk.behind(3.0)
        assert (await desk.report("unknown"))[0] == 503
        assert desk.reviews.asked == []
        desk.load.beat()
        for _ in range(9):
            desk.clock.now += BEAT_SECONDS
            desk.load.beat()
        assert (await desk.report("unknown"))[0] == 200
        assert desk.reviews.asked == ["unknown"]


async def test_an_agent_that_was_turned_away_is_not_silent() -> None:
    """So its pod is not lost with a node whose kubelet alone has died."""
    async with Desk().open() as desk:
        suspect = Node("n0", ready=False)
        lost_after = []
        for seconds in (0.0, 10.0):
            desk.behind(seconds)
            await desk.report()
            place = Place(desk.scene.status.slots[0], desk.scene.pods[UID], desk.store.heard[UID], suspect)
            lost_after.append(place.lost_at(10.0) - NOW - desk.clock.now)
        assert lost_after == pytest.approx([10.0, 10.0 + 2 * 15]), "told to stay away for 15 s, it may take twice that"


async def test_reviews_under_way_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_REVIEWS", 3)
    async with Desk().open() as desk:
        assert (await desk.report("known"))[0] == 200
        desk.reviews.go.clear()
        waiting = [asyncio.ensure_future(desk.report(f"new-{number}", news=True)) for number in range(3)]
        while desk.reviewer.under_way < 3:
            await asyncio.sleep(0.01)
        assert await desk.report("one too many", news=True) == (503, "2")
        assert (await desk.report("known"))[0] == 200
        desk.reviews.go.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200] * 3
        assert (await desk.report("one too many"))[0] == 200


@pytest.mark.parametrize("aside", [True, False])
async def test_a_scrape_holds_nobody_up(aside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so if the page were made in the event loop."""

    def page(_: object) -> bytes:
        time.sleep(1.0)
        return b"page"

    monkeypatch.setattr(health, "generate_latest", page)
    if not aside:

        async def here(call: Callable[[object], bytes], *given: object) -> bytes:
            return call(*given)

        monkeypatch.setattr("trireme_operator.serve.health.asyncio.to_thread", here)
    watch = Load()
    app = health.application(health.Health(lambda: 0.0), Metrics(), lambda: None)
    async with TestClient(TestServer(app)) as client:
        watch.beat()
        asking = asyncio.ensure_future(client.get("/metrics"))
        latest = 0.0
        while not asking.done():
            await asyncio.sleep(0.01)
            watch.beat()
            latest = max(latest, watch.late)
        assert await (await asking).read() == b"page"
    assert (latest < 0.5) is aside


async def test_both_connections_of_an_agent_cost_one_review() -> None:
    async with Desk().open() as desk:
        desk.reviews.go.clear()
        both = [asyncio.ensure_future(desk.report()) for _ in range(2)]
        while not desk.reviews.asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        desk.reviews.go.set()
        assert [status for status, _ in await asyncio.gather(*both)] == [200, 200]
        assert desk.reviews.asked == ["one"]
