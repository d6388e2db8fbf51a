"""How long this rank works on a step by itself: what tells a slow rank from those that wait for it.

All ranks of a gang take the same time for a step, for they wait for one another. A thread that looks many times a
second whether the main thread is inside a collective tells the waiting apart, where waiting is done by the host: on
CPUs. On a GPU the host waits for its device instead, so there nothing is told.
"""

from __future__ import annotations

import sys

PEERS = ("torch/distributed/", "torch\\distributed\\")
TOP = 4
"""Innermost frames that are looked at: deeper ones only led there."""
WINDOW_SECONDS = 1.0
LOOKS = 8
WEIGHT = 0.1
"""Of the newest window in the moving average: what a busy machine does for some seconds makes nobody slow."""


class Pace:
    def __init__(self) -> None:
        self._seconds = 0.0
        self._waited = 0.0
        self._looks = 0
        self._step: int | None = None
        self._average: float | None = None

    def look(self, passed: float, waits: bool, step: int) -> float | None:
        """`passed` seconds since the last look, `waits`: in a collective now, `step`: steps done. Seconds per step that
        were this rank's own, averaged; None until known."""
        if self._step is None:
            self._step = step
            return None
        self._seconds += passed
        self._waited += passed if waits else 0.0
        self._looks += 1
        gained = step - self._step
        if gained > 0 and self._seconds >= WINDOW_SECONDS and self._looks >= LOOKS:
            own = (self._seconds - self._waited) / gained
            self._average = own if self._average is None else (1 - WEIGHT) * self._average + WEIGHT * own
            self._seconds = self._waited = 0.0
            self._looks, self._step = 0, step
        elif gained < 0:
            self._seconds = self._waited = 0.0
            self._looks, self._step = 0, step
        return self._average


def waits_for_peers(thread: int) -> bool:
    """Whether that thread is inside torch.distributed."""
    frame = sys._current_frames().get(thread)
    for _ in range(TOP):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in PEERS):
            return True
        frame = frame.f_back
    return False
