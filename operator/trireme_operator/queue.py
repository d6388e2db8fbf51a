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
    urgent: float
    """From when on it is not patient; infinity where all that marked it was."""


class Queue:
    """Of the keys that are due, who waits longest beyond what it can bear goes first. A key that is being worked on is
    handed out again only after `done`. Of patient ones only a few are worked on at once: were all workers busy with
    them, each would wait for the others at the API server, and so would what cannot wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, patient_at_once: int = 4) -> None:
        self._clock, self._patient_at_once = clock, patient_at_once
        self._marks: dict[Key, Mark] = {}
        self._later: list[tuple[float, int, Key]] = []
        """By when they fall due or become urgent; of a key's entries those of its mark count. So in `_ready`."""
        self._ready: dict[bool, list[tuple[float, int, Key]]] = {False: [], True: []}
        """By rank; the patient ones apart."""
        self._count = itertools.count()
        self._busy: dict[Key, bool] = {}
        """Whether the mark it was handed out for was a patient one."""
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
        known = marks.get(key, Mark(math.inf, math.inf, math.inf))
        urgent = math.inf if patience else due
        mark = Mark(min(known.due, due), min(known.rank, due + patience), min(known.urgent, urgent))
        if mark == known:
            return
        marks[key] = mark
        if marks is self._marks:
            self._push(key, mark)

    def _push(self, key: Key, mark: Mark) -> None:
        for when in {mark.due, mark.urgent} - {math.inf}:
            heapq.heappush(self._later, (when, next(self._count), key))
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
            when, number, key = heapq.heappop(self._later)
            mark = self._marks.get(key)
            if mark is not None and when in (mark.due, mark.urgent):
                heapq.heappush(self._ready[mark.urgent > now], (mark.rank, number, key))
        open_to = [False, True] if sum(self._busy.values()) < self._patient_at_once else [False]
        firsts = [(first, patient) for patient in open_to if (first := self._first(patient, now)) is not None]
        if not firsts:
            return None
        (_, _, key), patient = min(firsts)
        heapq.heappop(self._ready[patient])
        del self._marks[key]
        self._busy[key] = patient
        return key

    def _first(self, patient: bool, now: float) -> tuple[float, int, Key] | None:
        """The lowest entry that counts; drops those superseded by another mark."""
        ready = self._ready[patient]
        while ready:
            rank, _, key = ready[0]
            mark = self._marks.get(key)
            if mark is not None and mark.due <= now and (mark.rank, mark.urgent > now) == (rank, patient):
                return ready[0]
            heapq.heappop(ready)
        return None

    def done(self, key: Key) -> None:
        if self._busy.pop(key, False):
            self._wake.set()
        mark = self._again.pop(key, None)
        if mark is not None:
            self._marks[key] = mark
            self._push(key, mark)

    def oldest_seconds(self) -> float:
        """How long the longest-due job that is not patient has waited beyond its time; 0 when none is late."""
        return max(0.0, self._clock() - min((mark.urgent for mark in self._marks.values()), default=math.inf))
