"""The goodput ledger: every second since a job's start is in exactly one state, and the states sum to the wall time.

One clock counts: the operator's. What the ranks tell are durations by their own clocks, which say how to divide the
time in which the operator saw them run; they never add to it. All arithmetic is in whole milliseconds: sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from trireme_api.ledger import LEDGER_STATES, OUTSIDE_THE_RUN, AttemptSeconds, GoodputStatus, SavedMark
from trireme_api.protocol import SPENT_STATES, Spent

from trireme_operator.decide.clock import seconds, stamp

RUNNING = "running"
"""Ranks run: the time is divided as they tell."""
KEPT_ATTEMPTS = 16
KEPT_SAVES = 8
MAX_SKEW_MS = 60_000
"""A clock that is behind by less (another replica's) waits until it has caught up; a larger step back is a clock put
right, and time counts on from there."""
MAX_STEP = 2**53
"""What a pod tells must fit into status."""
BEFORE_THE_RANKS = ("starting", "recovering")
IN_THE_LOOP = frozenset({"compile", "data-wait", "step"})


@dataclass
class Row:
    """AttemptSeconds in milliseconds."""

    attempt: int
    ms: dict[str, int] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    unexplained: int = 0
    unexplained_as: str = ""
    from_step: int | None = None
    step: int | None = None
    lost_steps: int = 0
    saves: list[tuple[int, int]] = field(default_factory=list)

    def add(self, state: str, amount: int) -> None:
        self.ms[state] = self.ms.get(state, 0) + amount

    def news(self, spent: Spent) -> bool:
        """Whether it tells of time that is not booked yet."""
        told = ((state, _ms(spent.seconds.get(state))) for state in SPENT_STATES)
        return any(value is not None and value > self.told.get(state, 0) for state, value in told)

    def explain(self, spent: Spent) -> None:
        """Divides the running time not explained yet by what the ranks tell of it."""
        told = {state: value for state in SPENT_STATES if (value := _ms(spent.seconds.get(state))) is not None}
        first = not self.told
        self._lose_told(told.get("lost", 0))
        due = {state: more for state, value in told.items() if (more := value - self.told.get(state, 0)) > 0}
        free = self.unexplained
        self.add(self.unexplained_as, -free)
        missing = sum(due.values()) - free
        if first and missing > 0:
            # The ranks began before the operator saw them run: that time was booked under what it waited for.
            for state in BEFORE_THE_RANKS:
                taken = min(missing, self.ms.get(state, 0))
                self.add(state, -taken)
                free, missing = free + taken, missing - taken
        given = shares(due, free)
        for state, amount in given.items():
            self.add(state, amount)
        for state in due:
            self.told[state] = told[state]
        self.told = self.told or {"init": 0}
        self._note_steps(spent)
        left = free - sum(given.values())
        if first:
            # Passed before the rank's process began, so no later report will explain it.
            self.add("init", left)
            left = 0
        self.unexplained_as = spent.state if spent.state in SPENT_STATES else "step"
        self.unexplained = left
        self.add(self.unexplained_as, left)

    def _lose_told(self, lost: int) -> None:
        """A rollback within the attempt: the ranks moved step time to lost time."""
        more = min(lost - self.told.get("lost", 0), self.told.get("step", 0))
        if more > 0:
            booked = min(more, self.ms.get("step", 0))
            self.add("step", -booked)
            self.add("lost", booked)
            self.told["step"] -= more
            self.told["lost"] = self.told.get("lost", 0) + more
            self.saves = []  # the newest that still counts is told again

    def _note_steps(self, spent: Spent) -> None:
        if spent.from_step is not None and self.from_step is None:
            self.from_step = min(max(0, spent.from_step), MAX_STEP)
        if spent.step is not None and self.from_step is not None:
            self.step = min(max(self.from_step, spent.step), MAX_STEP)
        at = _ms(spent.saved_seconds)
        whole = self.told.get("step", 0)
        if spent.saved_step is not None and 0 <= spent.saved_step <= MAX_STEP and at is not None and whole > 0:
            # In booked time, which differs from told time where clocks disagree.
            booked = min(at, whole) * self.ms.get("step", 0) // whole
            saves = [save for save in self.saves if save[0] < spent.saved_step]
            self.saves = [*saves, (spent.saved_step, booked)][-KEPT_SAVES:]

    def reach(self, step: int) -> bool:
        """Its ranks had done so many steps, as another pod tells, or this one after the end. Whether that is news."""
        if self.step is None or step <= self.step:
            return False
        before, self.step = self.step, min(step, MAX_STEP)
        return self.step != before

    def close(self, failed: bool) -> None:
        """The attempt has ended: what was never told is the step that was never done."""
        if failed and self.told and self.unexplained_as in IN_THE_LOOP:
            self.add(self.unexplained_as, -self.unexplained)
            self.add("lost", self.unexplained)
        self.told, self.unexplained, self.unexplained_as = {}, 0, ""

    def lose_after(self, step: int) -> None:
        """Training goes on from `step`: the time of this attempt's steps beyond it is lost."""
        if self.step is None or self.from_step is None or self.step < step:
            return
        base = max(step, self.from_step)
        lost = self.ms.get("step", 0) - self._until(base)
        self.add("step", -lost)
        self.add("lost", lost)
        self.lost_steps += self.step - base
        self.step = base
        self.saves = [save for save in self.saves if save[0] <= base]

    def _until(self, step: int) -> int:
        """Step time up to `step`: exact at checkpoints, in proportion between them."""
        assert self.from_step is not None
        assert self.step is not None
        whole = self.ms.get("step", 0)
        # The first step of a process is `compile` time.
        marks = [(self.from_step, 0), (self.from_step + 1, 0), *self.saves]
        before = max((mark for mark in marks if mark[0] <= step), default=(self.from_step, 0))
        after = min((mark for mark in self.saves if mark[0] > step), default=(max(self.step, step), whole))
        span = after[0] - before[0]
        part = (after[1] - before[1]) * (step - before[0]) // span if span > 0 else 0
        return min(whole, max(0, before[1] + part))


@dataclass
class Book:
    """GoodputStatus in milliseconds."""

    since: int
    state: str | None
    rows: list[Row] = field(default_factory=list)
    older: Row | None = None

    def row(self, attempt: int) -> Row:
        """The row of this attempt, the newest; a new one where it begins now."""
        if not self.rows or self.rows[-1].attempt != attempt:
            self.rows.append(Row(attempt))
            while len(self.rows) > KEPT_ATTEMPTS:
                self.older = merged(self.older, self.rows.pop(0))
        return self.rows[-1]

    def ended(self) -> Row | None:
        """The newest attempt that trained and ended, until the next tells where it goes on."""
        if not self.rows or self.rows[-1].from_step is not None:
            return None
        return next((row for row in reversed(self.rows[:-1]) if row.step is not None), None)

    def advance(self, now: int) -> None:
        """Books the time since the last call under the state that ran."""
        passed = now - self.since
        if passed < 0:
            if passed < -MAX_SKEW_MS:
                self.since = now
            return
        self.since = now
        if self.state is None or not passed:
            return
        row = self.rows[-1]
        if self.state == RUNNING:
            row.unexplained_as = row.unexplained_as or "step"
            row.unexplained += passed
            row.add(row.unexplained_as, passed)
        else:
            row.add(self.state, passed)

    def explain(self, spent: Spent) -> None:
        row = self.rows[-1]
        knew = row.from_step
        row.explain(spent)
        if knew is None and row.from_step is not None:
            self.lose_after(row.from_step, [*self.rows[:-1]])

    def lose_after(self, step: int, rows: Iterable[Row]) -> None:
        for row in (*([self.older] if self.older else []), *rows):
            row.lose_after(step)

    def totals(self) -> dict[str, int]:
        sums = dict.fromkeys(LEDGER_STATES, 0)
        for row in (*([self.older] if self.older else []), *self.rows):
            for state, amount in row.ms.items():
                sums[state] += amount
        return sums

    def status(self) -> GoodputStatus:
        totals = self.totals()
        ratio = effective(totals)
        rows = [*([self.older] if self.older else []), *self.rows]
        return GoodputStatus(
            ratio=None if ratio is None else round(ratio, 4),
            summary=None if ratio is None else f"{ratio:.1%}",
            seconds=_seconds(totals),
            lost_steps=sum(row.lost_steps for row in rows),
            state=self.state,
            since=stamp(self.since / 1000),
            attempts=[_row_status(row) for row in self.rows],
            older=_row_status(self.older) if self.older else None,
        )

    @classmethod
    def of(cls, status: GoodputStatus, now: float) -> Book:
        """From status, which may have been garbled: what cannot be is left out."""
        rows = [_row(row) for row in status.attempts]
        state = status.state if status.state in (*LEDGER_STATES, RUNNING) and rows else None
        return cls(milliseconds(status.since, now), state, rows, _row(status.older) if status.older else None)


def effective(totals: Mapping[str, int]) -> float | None:
    """Effective training time: useful training over elapsed time (Llama 3, 2407.21783 §3.3.4)."""
    elapsed = sum(amount for state, amount in totals.items() if state not in OUTSIDE_THE_RUN)
    return totals["step"] / elapsed if elapsed > 0 else None


def shares(due: Mapping[str, int], free: int) -> dict[str, int]:
    """`due` as it is, or scaled down to sum to `free`, without a millisecond lost to rounding."""
    whole = sum(due.values())
    if whole <= free:
        return dict(due)
    given: dict[str, int] = {}
    passed = before = 0
    for state, amount in due.items():
        passed += amount
        until = passed * free // whole
        given[state] = until - before
        before = until
    return given


def merged(older: Row | None, row: Row) -> Row:
    if older is None:
        return row
    for state, amount in row.ms.items():
        older.add(state, amount)
    older.attempt = row.attempt
    older.lost_steps += row.lost_steps
    if row.from_step is not None and row.step is not None:
        older.from_step = row.from_step if older.from_step is None else min(older.from_step, row.from_step)
        older.step = row.step if older.step is None else max(older.step, row.step)
    older.saves = []
    return older


def milliseconds(text: str | None, now: float) -> int:
    """A time of status, or now, as it will stand in status."""
    at = seconds(text)
    return round(1000 * (at if at is not None else seconds(stamp(now)) or 0.0))


def _ms(value: float | None) -> int | None:
    """A duration that a pod told; None for what is none."""
    if value is None or not math.isfinite(value) or value < 0:
        return None
    return round(min(value, 1e10) * 1000)


def _seconds(amounts: Mapping[str, int]) -> dict[str, float]:
    return {state: amount / 1000 for state, amount in amounts.items() if amount}


def _amounts(values: Mapping[str, float], known: Iterable[str]) -> dict[str, int]:
    return {state: amount for state in known if state in values and (amount := _ms(values[state]))}


def _row(row: AttemptSeconds) -> Row:
    ms = _amounts(row.seconds, LEDGER_STATES)
    held = row.unexplained_as if row.unexplained_as in SPENT_STATES else ""
    return Row(
        row.attempt, ms, _amounts(row.told, SPENT_STATES) or ({"init": 0} if row.told else {}),
        min(_ms(row.unexplained) or 0, ms.get(held, 0)), held, row.from_step, row.step, row.lost_steps,
        [(save.step, _ms(save.seconds) or 0) for save in row.saves],
    )  # fmt: skip


def _row_status(row: Row) -> AttemptSeconds:
    return AttemptSeconds(
        attempt=row.attempt, seconds=_seconds(row.ms), from_step=row.from_step, step=row.step,
        lost_steps=row.lost_steps, saves=[SavedMark(step=step, seconds=ms / 1000) for step, ms in row.saves],
        told={state: ms / 1000 for state, ms in row.told.items()}, unexplained=row.unexplained / 1000,
        unexplained_as=row.unexplained_as,
    )  # fmt: skip
