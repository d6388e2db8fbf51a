"""The trainer's step log: rows of steps by attempt, which of them count, and events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    step: int
    attempt: int
    time: float
    """Unix seconds when it was done."""
    loss: float | None = None
    tokens: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    skipped: bool = False
    spike: bool = False


@dataclass(frozen=True)
class Event:
    name: str
    attempt: int
    time: float
    fields: dict[str, Any]


@dataclass(frozen=True)
class StepLog:
    rows: tuple[Row, ...] = ()
    """In the order in which they were written."""
    events: tuple[Event, ...] = ()
    counts: tuple[bool, ...] = field(default=())
    """Of each row: False where a later one took its place, because an attempt resumed from before it."""

    @classmethod
    def parse(cls, lines: Iterable[str]) -> StepLog:
        """Lines that are torn or say nothing are left out."""
        rows: list[Row] = []
        events: list[Event] = []
        for line in lines:
            try:
                data = json.loads(line)
                attempt, at = int(data["attempt"]), float(data["time"])
                if "event" in data:
                    known = {k: v for k, v in data.items() if k not in ("event", "attempt", "time")}
                    events.append(Event(str(data["event"]), attempt, at, known))
                else:
                    rows.append(_row(data, attempt, at))
            except (ValueError, KeyError, TypeError):
                continue
        return cls(tuple(rows), tuple(events), _counting(rows))

    @property
    def effective(self) -> list[Row]:
        return [row for row, counts in zip(self.rows, self.counts, strict=True) if counts]

    @property
    def attempts(self) -> list[int]:
        return sorted({row.attempt for row in self.rows} | {event.attempt for event in self.events})

    def of(self, attempt: int) -> list[Row]:
        return [row for row in self.rows if row.attempt == attempt]

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def last(self, name: str, attempt: int) -> Event | None:
        return next((e for e in reversed(self.events) if e.name == name and e.attempt == attempt), None)


def _row(data: dict[str, Any], attempt: int, at: float) -> Row:
    def number(name: str) -> float | None:
        value = data.get(name)
        return float(value) if isinstance(value, int | float) and value == value else None

    return Row(
        int(data["step"]), attempt, at, number("loss"), number("tokens"), number("tokensPerSecond"), number("tflops"),
        number("mfu"), bool(data.get("skipped")), bool(data.get("spike")),
    )  # fmt: skip


def _counting(rows: list[Row]) -> tuple[bool, ...]:
    """Going back from the end: a row counts unless a later one is of the same or an earlier step.

    The log may have been thinned, so the very step that was done again need not be in it.
    """
    found, least = [], float("inf")
    for row in reversed(rows):
        found.append(row.step < least)
        least = min(least, row.step)
    return tuple(reversed(found))


def seconds_by_state(log: StepLog, attempt: int) -> dict[str, float]:
    """Where an attempt's time went, as its ranks told: whole where it ended well, else what its rows add up to."""
    ended = log.last("ended", attempt)
    if ended is not None and isinstance(ended.fields.get("seconds"), dict):
        return {str(k): float(v) for k, v in ended.fields["seconds"].items() if v}
    rows = log.of(attempt)
    started = log.last("started", attempt)
    spent: dict[str, float] = {}
    if started is not None:
        parts = {k: float(v) for k, v in started.fields.items() if k in STARTUP and isinstance(v, int | float)}
        spent = {"compile": parts.pop("first_step", 0.0), "init": sum(parts.values())}
    if len(rows) > 1:
        spent["step"] = rows[-1].time - rows[0].time
    return {state: value for state, value in spent.items() if value > 0}


STARTUP = ("imported", "rendezvous", "initialised", "loaded", "first_step")
