"""How long this rank works on a step by itself: what tells a slow rank from those that wait for it.

All ranks of a gang take the same time for a step, for they wait for one another. A thread that looks many times a
second whether the main thread is inside a collective tells the waiting apart, where waiting is done by the host: on
CPUs. On a GPU the host waits for its device instead, so there nothing is told.

Ten looks are a rough sample: of a rank that works half of its time, a window finds a sixth more or less, whatever a
step takes. So what is told is a mean over twenty windows, and nothing before ten.
"""

from __future__ import annotations

import sys

PEERS = ("torch/distributed/", "torch\\distributed\\")
TOP = 4
"""Innermost frames that are looked at: deeper ones only led there."""
WINDOW_SECONDS = 1.0
LOOKS = 8
WINDOWS = 20
"""In the moving mean: what a busy machine does for some seconds makes nobody slow."""
ENOUGH = 10
"""Windows before anything is told."""


class Pace:
    def __init__(self) -> None:
        self._step: int | None = None
        self._windows = -1
        """The first is not counted: what led to the first step is in it."""
        self._mean = 0.0

    def look(self, passed: float, waits: bool, step: int) -> float | None:
        """`passed` seconds since the last look, `waits`: in a collective now, `step`: steps done. Seconds per step that
        were this rank's own, averaged; None until known."""
        if self._step is None:
            self._begin(step)
            return None
        self._seconds += passed
        self._waited += passed if waits else 0.0
        self._looks += 1
        gained = step - self._step
        if gained > 0 and self._seconds >= WINDOW_SECONDS and self._looks >= LOOKS:
            self._end((self._seconds - self._waited) / gained)
            self._begin(step)
        elif gained < 0:
            self._begin(step)
        return self._mean if self._windows >= ENOUGH else None

    def _begin(self, step: int) -> None:
        self._seconds = self._waited = 0.0
        self._looks, self._step = 0, step

    def _end(self, own: float) -> None:
        """Each window weighs the same until there are WINDOWS of them; from then on a twentieth of what was."""
        self._windows += 1
        if self._windows > 0:
            self._mean += (own - self._mean) / min(self._windows, WINDOWS)


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
