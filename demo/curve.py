"""The loss curve of a run that may have been interrupted, from its step log (`metrics.jsonl`). Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    step: int
    attempt: int
    loss: float
    time: float
    """Unix seconds at which the step was written."""


@dataclass
class Curve:
    """`rows` holds every attempt's steps in the order written; a step done twice is there twice."""

    rows: list[Row] = field(default_factory=list)

    def attempts(self) -> list[int]:
        return sorted({row.attempt for row in self.rows})

    def of(self, attempt: int) -> list[Row]:
        return [row for row in self.rows if row.attempt == attempt]

    def newest(self) -> dict[int, float]:
        """Step → loss as the newest attempt had it: what counts."""
        best: dict[int, Row] = {}
        for row in self.rows:
            if row.step not in best or row.attempt >= best[row.step].attempt:
                best[row.step] = row
        return {step: best[step].loss for step in sorted(best)}

    def last_step(self) -> int:
        return max((row.step for row in self.rows), default=0)

    def repeated(self) -> dict[int, list[float]]:
        """Steps that more than one attempt did, with the loss each attempt had."""
        losses: dict[int, list[float]] = {}
        for row in self.rows:
            losses.setdefault(row.step, []).append(row.loss)
        return {step: values for step, values in sorted(losses.items()) if len(values) > 1}

    def largest_difference(self) -> float | None:
        """Largest difference between attempts at the same step; None where no step was done twice."""
        return max((max(values) - min(values) for values in self.repeated().values()), default=None)

    def restarts(self) -> list[Row]:
        """First step of every attempt after the first."""
        return [self.of(attempt)[0] for attempt in self.attempts()[1:]]

    def missing(self) -> list[int]:
        """Steps between the first and the last that no attempt wrote."""
        known = self.newest()
        return [step for step in range(1, self.last_step() + 1) if step not in known]


def parse(lines: Iterable[str]) -> Curve:
    """Reads step rows; events, and a line torn by a kill, are left out."""
    curve = Curve()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "event" not in row and isinstance(row.get("loss"), int | float) and "step" in row:
            curve.rows.append(
                Row(int(row["step"]), int(row.get("attempt", 0)), float(row["loss"]), float(row.get("time", 0)))
            )
    return curve
