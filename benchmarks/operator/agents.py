"""Stand-ins for agents: coroutines that speak the agents' protocol, at their rate and with their rules for a
coordinator that does not answer, two connections each."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from dataclasses import dataclass, field

import aiohttp
from trireme_agent.backoff import Backoff, Unreachable
from trireme_agent.link import ANSWER_TIMEOUT, CONNECT_TIMEOUT, POLL_SECONDS
from trireme_api.protocol import (
    Action,
    AgentState,
    Assignment,
    CheckpointRef,
    EnergyReading,
    Hardware,
    Progress,
    RankReport,
    Report,
    Spent,
)  # fmt: skip

REPORT_SECONDS = 5.0
STEP_SECONDS = 0.5
SAVE_STEPS = 200


@dataclass
class StandIn:
    """One agent with one rank that trains. Made within the event loop; `close` ends its connections."""

    url: str
    token: str
    uid: str
    tls: ssl.SSLContext
    began: float = 0.0
    attempt: int = 0
    state: AgentState = AgentState.WAITING
    holding: str | None = None
    answers: list[float] = field(default_factory=list)
    """Seconds that each report waited for its answer."""
    answered_at: float = 0.0
    told_away: int = 0
    """Answers that said when to come back."""
    troubles: int = 0
    """All other reports without a usable answer."""

    def __post_init__(self) -> None:
        self.lines = [aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1, keepalive_timeout=120), headers={
            "Authorization": f"Bearer {self.token}", "Content-Type": "application/json",
        }) for _ in range(2)]  # fmt: skip

    async def close(self) -> None:
        for line in self.lines:
            await line.close()

    def report(self) -> Report:
        passed = time.monotonic() - self.began if self.began else 0.0
        step, saved = int(passed / STEP_SECONDS), int(passed / STEP_SECONDS) // SAVE_STEPS * SAVE_STEPS
        report = Report(self.uid, self.attempt, self.state, holding=self.holding)
        report.energy = {"cpu": EnergyReading(40.0 * passed, "rapl"), "dram": EnergyReading(4.0 * passed, "rapl")}
        report.hardware = Hardware(passed, 0, None)
        if self.state is AgentState.RUNNING:
            report.ranks = [RankReport(0, pid=7, step=step, phase="step", heartbeat_age=0.1)]
            report.progress = Progress(
                step=step, total_steps=1_000_000, tokens=step * 2048, loss=3 + random.random(),
                tokens_per_second=4096.0, tflops=0.1,
            )  # fmt: skip
            report.spent = Spent({"init": 5.0, "step": passed}, "step", 0, step, saved, saved * STEP_SECONDS)
            report.checkpoint = CheckpointRef(saved, f"step-{saved}") if saved else None
        return report

    async def send(self, line: aiohttp.ClientSession, wait: int, news: bool = False) -> None:
        """Raises Unreachable."""
        body = json.dumps(self.report().to_json(), separators=(",", ":"))
        limit = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=wait + ANSWER_TIMEOUT)
        url = f"{self.url}?wait={wait}" + ("&news=1" if news else "")
        try:
            async with line.post(url, data=body, ssl=self.tls, timeout=limit) as answer:
                text = await answer.read()
                if answer.status != 200:
                    told = answer.headers.get("Retry-After")
                    raise Unreachable(f"HTTP {answer.status}", stay_away=float(told) if told else None)
        except TimeoutError:
            self.troubles += 1
            raise Unreachable("no answer in time", slow=True) from None
        except (OSError, aiohttp.ClientError) as error:
            self.troubles += 1
            raise Unreachable(str(error)) from None
        except Unreachable as error:
            self.told_away += error.stay_away is not None
            self.troubles += error.stay_away is None
            raise
        self.answered_at = time.monotonic()
        found = Assignment.from_json(json.loads(text))
        self.holding, self.attempt = found.tag, found.attempt
        if found.action is Action.RUN and self.state is AgentState.WAITING:
            self.state, self.began = AgentState.RUNNING, time.monotonic()

    async def poll(self) -> None:
        backoff = Backoff()
        while True:
            before = self.state, self.attempt
            try:
                await self.send(self.lines[0], POLL_SECONDS)
                if (self.state, self.attempt) != before:
                    await self.send(self.lines[0], 0, news=True)  # what is new is told at once
                backoff.reset()
            except Unreachable as error:
                await asyncio.sleep(backoff.after(error))

    async def push(self) -> None:
        backoff = Backoff()
        await asyncio.sleep(random.uniform(0, REPORT_SECONDS))
        while True:
            began = time.monotonic()
            try:
                if self.state is AgentState.RUNNING:
                    await self.send(self.lines[1], 0)
                    self.answers.append(time.monotonic() - began)
                backoff.reset()
                await asyncio.sleep(REPORT_SECONDS)
            except Unreachable as error:
                await asyncio.sleep(backoff.after(error))
