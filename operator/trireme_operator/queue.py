"""The queue of jobs to look at: one entry per job however often it is marked, back-off per job, a limit for all."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

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


class Mark(NamedTuple):
    due: float
    """Not looked at before."""
    rank: float
    """Of those that are due, the lowest is looked at first: when due, and what can wait longer than that later."""


class Queue:
    """Of the keys that are due, who waits longest beyond what it can bear goes first. A key that is being worked on is
    handed out again only after `done`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: dict[Key, Mark] = {}
        self._later: list[tuple[float, int, Key]] = []
        """By when they fall due; of several entries of a key the one of its mark counts. So in `_ready`."""
        self._ready: list[tuple[float, int, Key]] = []
        """By rank."""
        self._count = itertools.count()
        self._busy: set[Key] = set()
        self._again: dict[Key, Mark] = {}
        """Marked while being worked on."""
        self._failures: dict[Key, int] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, key: Key, after: float = 0.0, patience: float = 0.0) -> None:
        """Marks a job to be looked at in `after` seconds, or sooner if it already was; where there is more to do than
        time, after those that fall due up to `patience` seconds later."""
        due = self._clock() + max(0.0, after)
        marks = self._again if key in self._busy else self._marks
        known = marks.get(key, Mark(math.inf, math.inf))
        mark = Mark(min(known.due, due), min(known.rank, due + patience))
        if mark == known:
            return
        marks[key] = mark
        if marks is self._marks:
            self._push(key, mark)

    def _push(self, key: Key, mark: Mark) -> None:
        heapq.heappush(self._later, (mark.due, next(self._count), key))
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
            wait = max(0.0, self._later[0][0] - self._clock()) if self._later else None
            try:
                await asyncio.wait_for(self._wake.wait(), wait)
            except TimeoutError:
                continue

    def pop(self) -> Key | None:
        """The next job if one is due now."""
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            due, number, key = heapq.heappop(self._later)
            mark = self._marks.get(key)
            if mark is not None and mark.due == due:
                heapq.heappush(self._ready, (mark.rank, number, key))
        while self._ready:
            rank, _, key = heapq.heappop(self._ready)
            mark = self._marks.get(key)
            if mark is None or mark.rank != rank or mark.due > now:
                continue  # superseded by another mark
            del self._marks[key]
            self._busy.add(key)
            return key
        return None

    def done(self, key: Key) -> None:
        self._busy.discard(key)
        mark = self._again.pop(key, None)
        if mark is not None:
            self._marks[key] = mark
            self._push(key, mark)

    def oldest_seconds(self) -> float:
        """How long the longest-due job has waited beyond its time; 0 when none is late."""
        return max(0.0, self._clock() - min(mark.due for mark in self._marks.values())) if self._marks else 0.0
