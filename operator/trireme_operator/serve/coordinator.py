"""The service agents talk to: a report comes up, the current assignment goes down, and waits for it to change.

It decides nothing: reports go into the store, assignments are read off the written status. Training goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from trireme_api.protocol import REPORT_PATH, Assignment, ProtocolError, Report

from trireme_operator.act.api import ApiError
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.figures import only_figures
from trireme_operator.decide.gang import places
from trireme_operator.decide.views import Job, Key, Observed
from trireme_operator.observe.store import Store
from trireme_operator.serve.identity import Reviewer
from trireme_operator.serve.load import Load

log = logging.getLogger(__name__)
MAX_REPORT_BYTES = 256 * 1024
MAX_RANKS = 1024
MAX_WAIT_SECONDS = 55.0
SHORT_WAIT_SECONDS = 5.0
REPORTS_PER_SECOND = 300.0
"""What polling may cost; from 1,500 agents on the waits grow, and silence is noticed later."""
FIGURES_PATIENCE = 10.0
"""Figures that are due let what is decided go first for so long."""
COALESCE_SECONDS = 0.01
"""Reports of a large gang come in bursts; the crew is read anew once for each burst."""


@dataclass
class Watch:
    """The newest crew of one job, and the agents waiting for it to change."""

    crew: Crew
    read_at: float
    stale: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Coordinator:
    def __init__(
        self,
        store: Store,
        reviewer: Reviewer,
        *,
        observe: Callable[[Job], Observed],
        mark: Callable[[Key, float, float], None],
        figures_due: Callable[[Job], float],
        refresh: Callable[[Key], Awaitable[object]],
        leading: Callable[[], bool],
        load: Load | None = None,
        answered: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`mark`: a job is to be looked at in so many seconds, and can wait for so many more. `figures_due`: seconds
        until a job's figures may be written again. `answered`: told the HTTP status of each answer."""
        self._store, self._reviewer, self._observe, self._mark = store, reviewer, observe, mark
        self._figures_due = figures_due
        self._refresh, self._leading, self._clock = refresh, leading, clock
        self._load = load or Load()
        self._answered = answered
        self._watches: dict[Key, Watch] = {}
        self._closing = asyncio.Event()
        self._asked: dict[Key, float] = {}
        self.polling = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_REPORT_BYTES)
        app.router.add_post(REPORT_PATH, self._report)
        return app

    def close(self) -> None:
        """Answers every waiting agent, so that it turns to another replica at once."""
        self._closing.set()
        for watch in self._watches.values():
            watch.changed.set()

    # --- crews ------------------------------------------------------------------------------------------------------

    def touch(self, key: Key) -> None:
        """Something about this job changed: status, a pod, a report. Wakes its agents if it concerns them."""
        watch = self._watches.get(key)
        if watch is None or watch.stale:
            return
        watch.stale = True
        asyncio.get_running_loop().call_later(COALESCE_SECONDS, self._reread, key)

    def _reread(self, key: Key) -> None:
        watch, job = self._watches.get(key), self._store.jobs.get(key)
        if watch is None:
            return
        if job is None:
            del self._watches[key]
            watch.changed.set()
            return
        crew = Crew(job, places(job, self._observe(job)))
        watch.stale, watch.read_at = False, time.monotonic()
        if crew.key != watch.crew.key:
            self._watches[key] = Watch(crew, watch.read_at)
            watch.changed.set()

    def _watch(self, key: Key) -> Watch | None:
        job = self._store.jobs.get(key)
        if job is None:
            return None
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = Watch(Crew(job, places(job, self._observe(job))), time.monotonic())
        elif watch.stale and time.monotonic() - watch.read_at > COALESCE_SECONDS:
            self._reread(key)
            watch = self._watches.get(key)
        return watch

    # --- the request ------------------------------------------------------------------------------------------------

    async def _report(self, request: web.Request) -> web.StreamResponse:
        response = await self._answer(request)
        self._answered(response.status)
        return response

    async def _answer(self, request: web.Request) -> web.Response:
        if self._closing.is_set() or not self._leading():
            return _error(503, "this replica does not lead; ask again", {"Connection": "close"})
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        known = self._reviewer.knows(token)
        away = self._load.stay_away("news" in request.query, 0 if known else self._reviewer.under_way)
        try:
            caller = await self._reviewer.identify(token) if known or not away else None
        except ApiError as error:
            log.warning("token review: %s", error)
            return _error(503, "the API server cannot check tokens now; ask again", {"Retry-After": "2"})
        if away:
            if caller is not None:
                self._store.turned_away(caller.pod_uid, self._clock(), 2.0 * away)
            return _error(503, "too many ask at once; come back later", {"Retry-After": str(away)})
        if caller is None:
            return _error(401, "needs a pod-bound service account token with the audience trireme")
        key = request.match_info["namespace"], request.match_info["name"]
        if (caller.namespace, caller.pod) != (key[0], request.match_info["pod"]):
            return _error(403, "the token belongs to another pod")
        try:
            report = Report.from_json(await request.json())
            wait = min(self._longest_wait(), max(0.0, float(request.query.get("wait", "0"))))
            if len(report.ranks) > MAX_RANKS:
                raise ProtocolError(f"Report.ranks: at most {MAX_RANKS} (got {len(report.ranks)})")
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"a report may have at most {MAX_REPORT_BYTES} bytes")
        except ValueError as error:
            return _error(400, str(error))
        if report.pod_uid != caller.pod_uid:
            return _error(403, "the token belongs to another pod of this name")
        job = self._store.jobs.get(key)
        pod = self._store.pods.get(caller.pod_uid)
        if job is None or pod is None:
            await self._look_again(key)
            job, pod = self._store.jobs.get(key), self._store.pods.get(caller.pod_uid)
        if job is None or pod is None or pod.owner_uid != job.uid:
            return _error(404, f"the pod belongs to no TrainingJob {key[0]}/{key[1]}")
        before = self._store.heard.get(pod.uid)
        if self._store.hear(pod.uid, report, self._clock(), wait):
            if before is not None and only_figures(before.report, report):
                self._mark(key, self._figures_due(job), FIGURES_PATIENCE)
            else:
                self._mark(key, 0.0, 0.0)
                self.touch(key)
        assignment = await self._settled(key, pod.uid, report.holding, wait)
        if assignment is None:
            return _error(503, "this replica is closing; ask again", {"Connection": "close"})
        return web.json_response(assignment.to_json())

    def _longest_wait(self) -> float:
        """An answer is also a reason to report again: short while agents are few, so that a silent one is noticed."""
        return min(MAX_WAIT_SECONDS, max(SHORT_WAIT_SECONDS, self.polling / REPORTS_PER_SECOND))

    async def _look_again(self, key: Key) -> None:
        """An agent may be faster than our view of its pod; but nobody may make us read the API server all the time."""
        now = time.monotonic()
        if now - self._asked.get(key, 0.0) < 1.0:
            return
        if len(self._asked) > 4096:
            self._asked.clear()
        self._asked[key] = now
        try:
            await self._refresh(key)
        except ApiError as error:
            log.warning("refresh: %s", error, extra={"namespace": key[0], "job": key[1]})

    async def _settled(self, key: Key, uid: str, holding: str | None, wait: float) -> Assignment | None:
        """The assignment, once it differs from the one the agent holds or the time is over; None when closing."""
        until = time.monotonic() + wait
        self.polling += 1
        try:
            while True:
                if self._closing.is_set() or not self._leading():
                    return None
                watch = self._watch(key)
                if watch is None:
                    return None
                assignment = watch.crew.assignment(uid)
                left = until - time.monotonic()
                if assignment.tag != holding or left <= 0:
                    return assignment
                try:
                    await asyncio.wait_for(watch.changed.wait(), min(left, 5.0))
                except TimeoutError:
                    continue
        finally:
            self.polling -= 1


async def serve(
    app: web.Application, host: str, port: int, context: ssl.SSLContext | None
) -> tuple[web.AppRunner, int]:
    """Starts serving; returns what to clean up and the port (for 0)."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=5.0)
    await runner.setup()
    site = web.TCPSite(runner, host, port, ssl_context=context, reuse_address=True)
    await site.start()
    return runner, int(runner.addresses[0][1])


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": message}, status=status, headers=headers)
