"""The queue of jobs to look at: one entry per job however often it is marked, back-off per job, a limit for all."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

from trireme_operator.decide.views import Key

FIRST_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 60.0


class TokenBucket:
    """At most `rate` per second on average, `burst` at once. Waiters are served in the order they came."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._level, self._at = float(burst), clock()

    def reserve(self) -> float:
        """Takes one and returns how many seconds to wait before using it."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        self._level -= 1
        return max(0.0, -self._level / self._rate)

    async def take(self) -> float:
        wait = self.reserve()
        if wait > 0:
            await asyncio.sleep(wait)
        return wait


class Queue:
    """Keys in the order they fall due. A key that is being worked on is handed out again only after `done`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = itertools.count()
        self._busy: set[Key] = set()
        self._again: dict[Key, float] = {}
        """Marked while being worked on."""
        self._failures: dict[Key, int] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: Key, after: float = 0.0) -> None:
        """Marks a job to be looked at in `after` seconds, or sooner if it already was."""
        due = self._clock() + max(0.0, after)
        if key in self._busy:
            self._again[key] = min(due, self._again.get(key, due))
            return
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._count), key))
        self._wake.set()

    def retry(self, key: Key) -> float:
        """Marks a job whose last look failed; waits twice as long each time. Returns the seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        after: float = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(failures, 16))
        self.add(key, after)
        return after

    def forget(self, key: Key) -> None:
        """The last look succeeded: the next failure starts with a short wait again."""
        self._failures.pop(key, None)

    async def get(self) -> Key:
        """The next due job; the caller must call `done`."""
        while True:
            key = self.pop()
            if key is not None:
                return key
            self._wake.clear()
            wait = max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
            try:
                await asyncio.wait_for(self._wake.wait(), wait)
            except TimeoutError:
                continue

    def pop(self) -> Key | None:
        """The next job if one is due now."""
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) != due or key in self._busy:
                continue  # superseded by a sooner mark
            del self._due[key]
            self._busy.add(key)
            return key
        return None

    def done(self, key: Key) -> None:
        self._busy.discard(key)
        due = self._again.pop(key, None)
        if due is not None:
            self.add(key, due - self._clock())

    def oldest_seconds(self) -> float:
        """How long the longest-due job has waited beyond its time; 0 when none is late."""
        return max(0.0, self._clock() - min(self._due.values())) if self._due else 0.0
