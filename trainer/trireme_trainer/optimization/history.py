"""What rollbacks changed for good: batches left out, and the learning rate. Saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    rollbacks: int = 0
    learning_rate_factor: float = 1.0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """Batches [first, end) of the data order that no step trains on; ascending, apart from each other."""

    def batch_of(self, step: int) -> int:
        """Which batch of the data order step `step` (from 0) trains on: the `step`-th that is not left out."""
        batch = step
        for first, end in self.left_out:
            if batch < first:
                break
            batch += end - first
        return batch

    def roll_back(self, step: int, to: int, *, skip_window: int, learning_rate_factor: float) -> tuple[int, int]:
        """From `step` steps done back to `to`. Leaves out `skip_window` batches: those that led to the last step and
        its own, as far as they are to be done again; what is missing of the window is taken from those after it.

        Returns the window [first, end); batches in it that were left out before count as skipped, not again.
        """
        begin = max(to, step - skip_window)
        batches = [self.batch_of(begin + i) for i in range(skip_window)]
        self.left_out = _merged([*self.left_out, *((batch, batch + 1) for batch in batches)])
        self.rollbacks += 1
        self.learning_rate_factor *= learning_rate_factor
        return batches[0], batches[-1] + 1

    def saved(self) -> dict[str, Any]:
        return {
            "rollbacks": self.rollbacks,
            "learningRateFactor": self.learning_rate_factor,
            "leftOut": [list(window) for window in self.left_out],
        }

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> History:
        return cls(
            rollbacks=int(saved.get("rollbacks", 0)),
            learning_rate_factor=float(saved.get("learningRateFactor", 1.0)),
            left_out=[(int(first), int(end)) for first, end in saved.get("leftOut", [])],
        )


def _merged(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, end in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged
