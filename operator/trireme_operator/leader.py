"""One leader among the replicas, by a coordination Lease.

Own code, because the client's election measures with the wall clock, cannot release, and has no fence: here `leading`
turns false by the local monotonic clock before any other replica may take the lease, however long this process froze.
It renews in an event loop of its own (`aside`): a main loop that is busy answering agents keeps the lease, and one that
is stuck loses it, for it shows no sign of life.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from trireme_operator.act.api import Api, ApiError, Json
from trireme_operator.decide.clock import microtime

log = logging.getLogger(__name__)
STUCK_SECONDS = 60.0
"""Without a sign of life of the main loop for so long, the lease is renewed no more. Longer than a loop that is merely
slow takes for one turn; a kubelet that finds liveness red is sooner."""


class LeadershipLost(Exception):
    """The lease could not be renewed in time: what this process believes may be old, so it ends and starts anew."""


class Leader:
    """Times in seconds: the lease lasts `duration`; it is renewed every `duration`/6 and given up as lost after two
    thirds of it. `leading` and `alive` may be called from any thread."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._path, self._namespace, self._name = api, _path(namespace), namespace, name
        self.identity = identity
        self._duration, self._clock, self._wall = duration, clock, wall
        self._pause = duration / 6
        self._renewed: float | None = None
        """When the renewal that succeeded last was begun."""
        self._seen: tuple[str, float] = ("", 0.0)
        """The newest record of another holder, and when we first saw it."""
        self._unseen = 0
        """Renewals due since the main loop last showed that it lives. Counted, not timed: in a process that was frozen
        as a whole neither went on."""
        self.transitions = 0

    @property
    def leading(self) -> bool:
        """The fence: true only while no one else can hold the lease."""
        renewed = self._renewed
        return renewed is not None and self._clock() < renewed + self._duration * 2 / 3

    def alive(self) -> None:
        """The main loop's sign of life."""
        self._unseen = 0

    async def lead(self, begin: Callable[[], object]) -> None:
        """Waits for the lease, calls `begin`, and renews for ever; raises LeadershipLost."""
        await self.acquire()
        self.alive()
        begin()
        await self.keep()

    async def acquire(self) -> None:
        """Waits until this replica leads."""
        while not await self.attempt():
            await asyncio.sleep(self._pause)
        log.info("leading", extra={"identity": self.identity})

    async def keep(self) -> None:
        """Renews for ever, while there are signs of life; raises LeadershipLost."""
        while True:
            await asyncio.sleep(self._pause)
            self._unseen += 1
            stuck = self._unseen * self._pause > STUCK_SECONDS
            if stuck:
                log.error("the main loop has been stuck for %.0f s: the lease is not renewed", STUCK_SECONDS)
            if (stuck or not await self.attempt()) and not self.leading:
                self._renewed = None
                raise LeadershipLost(
                    f"lease {self._namespace}/{self._name} is held by another or could not be renewed in time"
                )

    async def attempt(self) -> bool:
        """One try to get or renew the lease; True if this replica holds it now."""
        began = self._clock()
        try:
            # A server that is silent must leave time for one that is not.
            async with asyncio.timeout(self._duration / 3):
                held = await self._try()
        except (ApiError, TimeoutError) as error:
            log.warning("lease: %s", str(error) or "no answer in time")
            return False
        if held:
            self._renewed = began
        return held

    async def _try(self) -> bool:
        try:
            lease = await self._api.get(f"{self._path}/{self._name}")
        except ApiError as error:
            if not error.not_found:
                raise
            return await self._write(None)
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self.identity):
            record = str(sorted(spec.items()))
            if record != self._seen[0]:
                self._seen = record, self._clock()
            # Its own duration, by our clock since we saw it change: the clocks of two machines are never compared.
            if self._clock() < self._seen[1] + float(spec.get("leaseDurationSeconds") or self._duration):
                self._renewed = None
                return False
        return await self._write(lease)

    async def _write(self, lease: Json | None) -> bool:
        now = microtime(self._wall())
        old = (lease or {}).get("spec") or {}
        mine = old.get("holderIdentity") == self.identity
        self.transitions = int(old.get("leaseTransitions") or 0) + (0 if mine or lease is None else 1)
        body: Json = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": (lease or {}).get("metadata") or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": max(1, round(self._duration)),
                "acquireTime": old.get("acquireTime") if mine else now,
                "renewTime": now,
                "leaseTransitions": self.transitions,
            },
        }
        try:
            if lease is None:
                await self._api.create(self._path, body)
            else:
                await self._api.update(f"{self._path}/{self._name}", body)
        except ApiError as error:
            if error.exists or error.conflict:
                return False
            raise
        return True

    async def release(self) -> None:
        """Lets the next one in at once. Only after all writing has stopped."""
        if self._renewed is None:
            return
        self._renewed = None
        try:
            lease = await self._api.get(f"{self._path}/{self._name}")
            if (lease.get("spec") or {}).get("holderIdentity") == self.identity:
                lease["spec"]["holderIdentity"] = ""
                await self._api.update(f"{self._path}/{self._name}", lease)
        except ApiError as error:
            log.warning("lease not released: %s", error)


def _path(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
