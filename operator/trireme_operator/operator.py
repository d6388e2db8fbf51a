"""Puts the parts together and runs them: watches, election, workers, coordinator, endpoints; and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import signal
import time
from collections.abc import Coroutine, Sequence
from typing import Any
from urllib.parse import urlsplit

import kopf
from aiohttp import web
from trireme_api.job import TERMINAL

from trireme_operator.act.api import Api, ApiError, once_reachable
from trireme_operator.act.cluster import KubernetesCluster
from trireme_operator.aside import Aside
from trireme_operator.controller import Controller
from trireme_operator.decide.gang import HOLDING
from trireme_operator.decide.pods import Images
from trireme_operator.decide.views import Job, Key, Limits
from trireme_operator.leader import Leader
from trireme_operator.observe import handlers
from trireme_operator.observe.desk import Desk, foreign_taken
from trireme_operator.observe.gridwatch import GridWatch
from trireme_operator.observe.leases import SAMPLE_SECONDS, Leases, renewal_of
from trireme_operator.observe.store import Store
from trireme_operator.options import COORDINATOR_SERVICE, Options
from trireme_operator.queue import Queue
from trireme_operator.serve import certificates
from trireme_operator.serve.coordinator import Coordinator, serve
from trireme_operator.serve.health import Health, application
from trireme_operator.serve.identity import Reviewer
from trireme_operator.serve.load import BEAT_SECONDS, Load
from trireme_operator.serve.metrics import JobCollector, Metrics
from trireme_operator.tracing import Off, Tracing

log = logging.getLogger(__name__)
REVIEW_QPS = 500.0
"""Thousands of agents turn to a new leader at once, and each must be known before it is answered."""
FOREIGN_SECONDS = 15.0
RENEW_CERTIFICATE_SECONDS = 86_400.0


class Operator:
    def __init__(
        self, options: Options, api: Api, reviews: Api, lease: Api, aside: Aside, tracing: Tracing | None = None
    ) -> None:
        """`lease`: reaches the API server from within `aside`, whatever the others wait for."""
        self.options, self.api, self.reviews, self.aside = options, api, reviews, aside
        self.store, self.metrics = Store(), Metrics()
        self.queue = Queue(patient_at_once=max(1, options.workers // 4))
        self.tracing: Tracing = tracing or Off()
        self.desk = Desk(self.store)
        self.load = Load()
        self.health = Health(self.queue.oldest_seconds)
        self.leader = Leader(
            lease, options.own_namespace, options.lease_name, options.identity, duration=options.lease_seconds
        )
        self.cluster = KubernetesCluster(api, options.namespaces, self.leader, options.identity)
        self.coordinator = Coordinator(
            self.store,
            Reviewer(reviews),
            observe=lambda job: self.controller.observed(job),
            mark=self.queue.add,
            figures_due=lambda job: self.controller.figures_due(job),
            refresh=lambda key: self.controller.refresh(key),
            leading=lambda: self.leader.leading,
            load=self.load,
            answered=lambda code: self.metrics.answers.labels(str(code)).inc(),
        )
        self.grids = GridWatch(options.carbon_settings, options.carbon_secrets)
        self.grids.read()
        self.controller: Controller
        self._tls = certificates.server_context()
        self._kopf_stop = asyncio.Event()
        self.metrics.registry.register(JobCollector(self.store, leading=lambda: self.leader.leading))
        for one in (api, reviews, lease):
            one.observe = self.metrics.api_request

    async def run(self) -> None:
        """Until a signal comes or a part fails; raises what made it fail."""
        options = self.options
        status, metrics_port = await serve(
            application(self.health, self.metrics, self._gauges), "0.0.0.0", options.metrics_port, None
        )
        images = await once_reachable(self._install_certificate)
        limits = Limits(
            progress_seconds=self.options.progress_seconds,
            gang_seconds=self.options.gang_seconds,
            shrink_seconds=self.options.shrink_seconds,
            snooze_seconds=self.options.snooze_seconds,
        )
        self.controller = Controller(
            self.store, self.queue, self.desk, self.cluster, images, limits=limits, written=self._written,
            grid=lambda: self.grids.grid,
            tracing=self.tracing,
        )
        agents, port = await serve(
            self.coordinator.application(), options.coordinator_host, options.coordinator_port, self._tls
        )
        self.health.serving = True
        log.info("serving", extra={"coordinator": port, "metrics": metrics_port, "agents_use": images.coordinator})
        ready = asyncio.Event()
        watches = asyncio.ensure_future(self._watch(ready))
        parts = [asyncio.ensure_future(part) for part in (self._signal(ready), self._lead(), self._renew_certificate())]
        try:
            done, _ = await asyncio.wait([watches, *parts], return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            await self._stop(parts, [agents, status])
            self.tracing.close()
            self._kopf_stop.set()
            await asyncio.gather(watches, return_exceptions=True)
            log.info("stopped")

    async def _signal(self, ready: asyncio.Event) -> None:
        """Returns at SIGTERM or SIGINT. Takes the signals over from kopf, which would end our tasks in any order."""
        await ready.wait()
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        log.info("stopping")

    async def _stop(self, parts: Sequence[asyncio.Future[None]], runners: list[web.AppRunner]) -> None:
        """Agents are sent to another replica, writing ends, then the lease is released; in this order."""
        self.health.serving = False
        self.coordinator.close()
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.aside.run(self.leader.release()), 5.0)
        for runner in runners:
            await runner.cleanup()

    # --- parts ------------------------------------------------------------------------------------------------------

    async def _watch(self, ready: asyncio.Event) -> None:
        options = self.options
        registry = handlers.registry(
            self.store, self.health, self._mark, nodes=options.watch_nodes, kubeconfig=options.kubeconfig
        )
        await kopf.operator(
            registry=registry,
            settings=handlers.settings(),
            clusterwide=not options.namespaces,
            namespaces=options.namespaces,
            standalone=True,
            stop_flag=self._kopf_stop,
            ready_flag=ready,
        )

    async def _lead(self) -> None:
        """Waits for the lease with a warm view, then works until the lease is lost."""
        await once_reachable(self._resync)
        self.health.synced = True
        led, loop = asyncio.Event(), asyncio.get_running_loop()
        lead = self.leader.lead(lambda: loop.call_soon_threadsafe(led.set))
        await self._beside(self.aside.run(lead), self._live(), self._work(led))

    async def _live(self) -> None:
        while True:
            self.leader.alive()
            self.load.beat()
            await asyncio.sleep(BEAT_SECONDS)

    async def _work(self, led: asyncio.Event) -> None:
        await led.wait()
        self.store.begin_listening(self.controller.clock())
        await self._resync()
        for key in self.store.jobs:
            self.queue.add(key)
        await self._beside(
            self._keep_in_step(),
            self._count_others(),
            self._hear_kubelets(),
            self.cluster.post_notes(),
            self.grids.keep(self._zones, self._grid_changed),
            self.controller.keep_admitting(),
            *(self.controller.work(self.metrics.reconciled) for _ in range(self.options.workers)),
        )

    @staticmethod
    async def _beside(*parts: Coroutine[Any, Any, None]) -> None:
        """Runs all; the first to end or fail ends the others."""
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_in_step(self) -> None:
        while True:
            await asyncio.sleep(self.options.resync_seconds)
            try:
                await self._resync()
            except ApiError as error:
                log.warning("resync: %s", error)

    async def _resync(self) -> None:
        if self.options.watch_nodes:
            nodes, _ = await self.cluster.list_nodes()
            changed = self.store.replace_nodes(nodes, self.controller.clock())
            self.health.listed("nodes", int(changed))
            await self._learn_priorities()
            self.desk.foreign = foreign_taken(await self.cluster.list_foreign_pods())
        jobs, pods = await self.controller.resync()
        self.health.listed("trainingjobs", jobs)
        self.health.listed("pods", pods)

    async def _count_others(self) -> None:
        """Room that pods of others take matters only while a job waits for room."""
        while self.options.watch_nodes:
            await asyncio.sleep(FOREIGN_SECONDS)
            try:
                await self._learn_priorities()
                if self.desk.anyone_waits():
                    self.desk.foreign = foreign_taken(await self.cluster.list_foreign_pods())
                    self.store.capacity_version += 1
            except ApiError as error:
                log.warning("pods of others: %s", error)

    async def _hear_kubelets(self) -> None:
        """Looks at the leases of nodes while any gang is on them."""
        kubelets, trouble = Leases(), ""
        while self.options.watch_nodes:
            await asyncio.sleep(SAMPLE_SECONDS)
            if not any(job.status.phase in HOLDING for job in self.store.jobs.values()):
                continue
            try:
                renewals = [renewal_of(obj) for obj in await self.cluster.list_node_leases()]
            except ApiError as error:
                if trouble != (trouble := str(error)):  # every few seconds is too often to say the same
                    log.warning("leases of nodes: %s; dead nodes are noticed by their conditions only", error)
                continue
            trouble = ""
            stale = kubelets.sample(renewals, time.monotonic())
            for name in self.store.mark_stale(stale, self.controller.clock()):
                log.warning("node %s: its kubelet %s", name, "is silent" if name in stale else "is heard again")
                for key in self.store.jobs_on(name):
                    self.queue.add(key)
        await asyncio.Event().wait()

    async def _learn_priorities(self) -> None:
        for name in self.desk.priority_names():
            value = await self.cluster.priority_of(name)
            if value is None:
                self.desk.priorities.pop(name, None)
            elif self.desk.priorities.get(name) != value:
                self.desk.priorities[name] = value
                self.store.capacity_version += 1

    async def _renew_certificate(self) -> None:
        while True:
            await asyncio.sleep(RENEW_CERTIFICATE_SECONDS)
            try:
                self.controller.images = await self._install_certificate()
            except ApiError as error:
                log.warning("certificate not renewed: %s", error)

    async def _install_certificate(self) -> Images:
        options, now = self.options, datetime.datetime.now(datetime.UTC)
        found = await certificates.authorities(self.api, options.own_namespace, options.ca_secret, now)
        host = urlsplit(options.coordinator_url).hostname or ""
        name = f"{COORDINATOR_SERVICE}.{options.own_namespace}.svc"
        hosts = dict.fromkeys(filter(None, (host, name, f"{name}.cluster.local", "localhost", "127.0.0.1")))
        certificates.load_into(
            self._tls, *certificates.make_serving(certificates.signing(found, now), list(hosts), now)
        )
        return Images(
            trainer=options.trainer_image,
            agent=options.agent_image,
            coordinator=options.coordinator_url,
            coordinator_ca=certificates.bundle(found),
            pull_policy=options.image_pull_policy,
            json_logs=options.log_format == "json",
            powercap=options.powercap,
        )

    # --- wiring -----------------------------------------------------------------------------------------------------

    def _mark(self, key: Key) -> None:
        self.queue.add(key)
        self.coordinator.touch(key)

    def _written(self, before: Job, after: Job) -> None:
        self.coordinator.touch(after.key)
        self.metrics.status_written(before, after)
        self.tracing.status_written(before, after)

    def _zones(self) -> set[str]:
        """Zones of the jobs that have not ended, as they name them."""
        zones = {job.spec.carbon_policy.zone for job in self.store.jobs.values() if _open(job) and job.spec}
        return {name for zone in zones if (name := zone or self.grids.grid.default_zone)}

    def _grid_changed(self, codes: set[str]) -> None:
        for job in self.store.jobs.values():
            if _open(job):
                self.queue.add(job.key)

    def _gauges(self) -> None:
        self.metrics.queue_depth.set(len(self.queue))
        self.metrics.queue_age.set(self.queue.oldest_seconds())
        self.metrics.late.set(self.load.late)
        self.metrics.leader.set(float(self.leader.leading))
        self.metrics.polling.set(self.coordinator.polling)
        for resource, (age, unannounced) in self.health.watches().items():
            self.metrics.event_age.labels(resource).set(age)
            self.metrics.unannounced.labels(resource).set(unannounced)


def _open(job: Job) -> bool:
    return job.status.phase not in TERMINAL
