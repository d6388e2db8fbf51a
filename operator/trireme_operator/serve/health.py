"""Liveness and readiness that mean something, and the endpoint for them and for metrics.

Alive: the event loop answers, no job has waited for long in the queue, and no watch is silent while LISTs find news.
Ready: jobs, pods and nodes have been read once and the coordinator listens (a standby is ready, too).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from trireme_operator.serve.metrics import Metrics

QUEUE_SECONDS = 120.0
QUIET_SECONDS = 90.0
QUIET_LISTS = 3


@dataclass
class Pulse:
    """One watch: a LIST that finds what no event has told, again and again, means that the watch is dead."""

    event_at: float
    surprises: int = 0
    """LISTs with news since the last event."""


@dataclass
class Health:
    queue_age: Callable[[], float]
    clock: Callable[[], float] = time.monotonic
    synced: bool = False
    serving: bool = False
    pulses: dict[str, Pulse] = field(default_factory=dict)

    def event(self, resource: str) -> None:
        self.pulses[resource] = Pulse(self.clock())

    def listed(self, resource: str, news: int) -> None:
        pulse = self.pulses.setdefault(resource, Pulse(self.clock()))
        pulse.surprises += news > 0

    def watches(self) -> dict[str, tuple[float, int]]:
        """By resource: seconds since its last event, and LISTs with news since then."""
        return {name: (self.clock() - pulse.event_at, pulse.surprises) for name, pulse in self.pulses.items()}

    def ailments(self) -> list[str]:
        """Why the process should be started anew; empty when it is well."""
        found = []
        age = self.queue_age()
        if age > QUEUE_SECONDS:
            found.append(f"a job has waited {age:.0f} s in the queue")
        for resource, pulse in self.pulses.items():
            quiet = self.clock() - pulse.event_at
            if pulse.surprises >= QUIET_LISTS and quiet > QUIET_SECONDS:
                found.append(
                    f"the watch of {resource} is silent for {quiet:.0f} s while {pulse.surprises} LISTs found news"
                )
        return found

    def unready(self) -> list[str]:
        return [
            text
            for ok, text in ((self.synced, "not synchronised yet"), (self.serving, "coordinator not listening"))
            if not ok
        ]


def application(health: Health, metrics: Metrics, refresh: Callable[[], None]) -> web.Application:
    """`refresh` brings the gauges up to date before a scrape."""

    async def healthz(_: web.Request) -> web.Response:
        return _verdict(health.ailments())

    async def readyz(_: web.Request) -> web.Response:
        return _verdict(health.unready())

    async def scrape(_: web.Request) -> web.Response:
        refresh()
        # Of a thousand jobs that is half a second's work, in which agents would not be answered.
        page = await asyncio.to_thread(generate_latest, metrics.registry)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    return app


def _verdict(complaints: list[str]) -> web.Response:
    return web.Response(status=500 if complaints else 200, text="; ".join(complaints) or "ok")
