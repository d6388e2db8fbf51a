"""How often to save: Young's interval from the measured cost of a save and the failures seen so far. Pure: no clock.

The formula and what is assumed of failures before a job has its own: `trireme_api.reliability`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from trireme_api.reliability import mean_time_between_failures, young

MAX_SECONDS = 3600.0
"""Never rarer: an estimate that is too hopeful may cost an hour of work, no more."""
FIRST_SAVE = 8
"""Steps of an attempt before its first save: what a save costs must be seen once."""
CALM_STEPS = 20


def interval_steps(*, cost: float, duration: float, step_seconds: float, mtbf: float) -> int:
    """Steps between saves. `duration`: until one is committed; the next cannot begin earlier without waiting for it."""
    wanted = min(max(young(cost, mtbf), duration), max(MAX_SECONDS, duration))
    return max(1, round(wanted / max(step_seconds, 1e-9)))


@dataclass(frozen=True)
class Measured:
    """Of the newest save: what all ranks together make of it."""

    cost: float
    """Seconds training lost: blocked, and steps slowed down while it was written."""
    duration: float
    step_seconds: float


class AutoInterval:
    """When the next save is due. Every rank has one, and asks at every step; they agree where it matters."""

    def __init__(self, first: int, *, nodes: int, failures: int, seconds: float) -> None:
        """`first`: steps done when this attempt began; `failures` in `seconds` of earlier running."""
        self._nodes, self._failures, self._seconds = nodes, failures, seconds
        self._last = first
        self._next: int | None = first + FIRST_SAVE
        self.steps: int | None = None
        """The interval in force; None until a save was measured."""
        self.mtbf = mean_time_between_failures(nodes, failures, seconds)
        self.measured: Measured | None = None

    def due(
        self, step: int, running: float, mine: Measured | None, agree: Callable[[Sequence[float]], Sequence[float]]
    ) -> bool:
        """`running`: seconds of this attempt; `mine`: of the newest save on this rank, None while it is in flight.

        `agree` averages over ranks. It is called only 1, 2, 4, 8… steps after a save, until all ranks know its cost.
        """
        if self._next is None and _power_of_two(step - self._last):
            known = mine or Measured(0.0, 0.0, 0.0)
            told = agree([float(mine is not None), known.cost, known.duration, known.step_seconds, running])
            if told[0] > 0.999:
                self.measured = Measured(*told[1:4])
                self.mtbf = mean_time_between_failures(self._nodes, self._failures, self._seconds + told[4])
                self.steps = interval_steps(
                    cost=told[1], duration=told[2], step_seconds=told[3], mtbf=self.mtbf
                )
                self._next = max(self._last + self.steps, step)
        if self._next is None or step < self._next:
            return False
        self._last, self._next = step, None
        return True

    def figures(self) -> dict[str, float]:
        """What the interval in force follows from; empty until a save was measured."""
        if self.steps is None or self.measured is None:
            return {}
        return {
            "steps": self.steps,
            "seconds": round(self.steps * self.measured.step_seconds, 3),
            "costSeconds": round(self.measured.cost, 4),
            "saveSeconds": round(self.measured.duration, 4),
            "stepSeconds": round(self.measured.step_seconds, 5),
            "mtbfSeconds": round(self.mtbf, 1),
            "failures": self._failures,
        }


class Slowing:
    """Step times with and without a save being written: their difference is part of what the save costs."""

    def __init__(self) -> None:
        self._calm: deque[float] = deque(maxlen=CALM_STEPS)
        self._slowed = 0.0
        self._begun = False

    def step(self, seconds: float, *, saving: bool) -> None:
        """`seconds` of one step, without what training waited for the save itself. The first (compile) is left out."""
        if not self._begun:
            self._begun = True
        elif saving:
            self._slowed += seconds - self.step_seconds if self._calm else 0.0
        else:
            self._calm.append(seconds)

    def saved(self) -> float:
        """Seconds the steps took longer in all while the save was written; counts from zero again."""
        slowed, self._slowed = max(self._slowed, 0.0), 0.0
        return slowed

    @property
    def step_seconds(self) -> float:
        """Median of the newest steps without a save; 0 before there was one."""
        return median(self._calm) if self._calm else 0.0


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
