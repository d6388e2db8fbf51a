"""The rank's side of the goodput ledger: every second of this process is in exactly one state (protocol.SPENT_STATES).

One clock reading ends one state and begins the next, so the states sum to the process's wall time by construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trireme_api.protocol import SPENT_STATES, Spent

KEPT_MARKS = 64
"""Steps whose time is remembered, for commits that come later and for a rollback."""


class Ledger:
    """Begins in `init`. `enter` moves on for good; `with during(state):` is an episode, after which the state before
    it goes on. Episodes nest; the innermost one counts. Moved on by one thread."""

    def __init__(self, started: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """`started`: Unix seconds at which the process began; what passed since then is `init`."""
        self._clock = clock
        self._state = "init"
        self._mark = clock() - (max(0.0, time.time() - started) if started is not None else 0.0)
        self._spent = dict.fromkeys(SPENT_STATES, 0.0)
        self._marks: dict[int, float] = {}
        self._from_step: int | None = None
        self._step: int | None = None
        self._saved: tuple[int, float] | None = None

    def enter(self, state: str) -> None:
        """What follows is `state`, until something else is entered. Raises ValueError for one that does not exist."""
        if state not in self._spent:
            raise ValueError(f"no ledger state {state!r}; there are {', '.join(self._spent)}")
        now = self._clock()
        self._spent[self._state] += now - self._mark
        self._state, self._mark = state, now

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        before = self._state
        self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """By state, up to now. Changes nothing, so that another thread (the hang watch) may ask, too."""
        state, spent = self._state, dict(self._spent)
        spent[state] += self._clock() - self._mark
        return spent

    @property
    def training(self) -> float:
        """Seconds in the loop's own work: steps, the first one included, and waiting for data."""
        seconds = self.seconds
        return seconds["step"] + seconds["compile"] + seconds["data-wait"] + seconds["lost"]

    def resumed(self, step: int) -> None:
        """The loop begins after this many optimiser steps: those of the checkpoint, or 0."""
        self._from_step = self._step = step
        self._marks = {step: self.seconds["step"]}

    def stepped(self, step: int) -> None:
        """`step` optimiser steps are done and their numbers read."""
        self._step = step

    def saving(self, step: int) -> None:
        """State after `step` steps is copied now."""
        self._marks[step] = self.seconds["step"]
        while len(self._marks) > KEPT_MARKS:
            del self._marks[next(iter(self._marks))]

    def committed(self, step: int) -> None:
        """A save of either tier is complete; they may be told of out of order."""
        if step in self._marks and (self._saved is None or step > self._saved[0]):
            self._saved = step, self._marks[step]

    def rolled_back(self, step: int) -> None:
        """Training goes back to the state after `step` steps: the time of all steps since is lost."""
        now = self.seconds["step"]
        known = [mark for mark in self._marks if mark <= step]
        kept = self._marks[max(known)] if known else 0.0
        self._spent["step"] -= now - kept
        self._spent["lost"] += now - kept
        self._marks = {mark: self._marks[mark] for mark in known}
        self._step = step
        if self._saved is not None and self._saved[0] > step:
            self._saved = None

    def told(self) -> Spent:
        """For the heartbeat."""
        saved = self._saved
        return Spent(
            seconds={state: round(spent, 4) for state, spent in self.seconds.items() if spent > 0},
            state=self._state,
            from_step=self._from_step,
            step=self._step,
            saved_step=saved[0] if saved else None,
            saved_seconds=round(saved[1], 4) if saved else None,
        )
