"""How long an agent stays away from a coordinator that gave no usable answer.

One that is gone costs nothing to ask, and is to be found soon when it is back: pauses up to 5 s. One that is there and
too slow has more to do for each that comes again, its handshake above all: pauses that grow faster, up to 30 s. One
that says how long is obeyed.
"""

from __future__ import annotations

import random
from typing import Optional

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
LONGEST_WHILE_SLOW = 30.0


class Unreachable(Exception):
    """No usable answer; the text says why in one line."""

    def __init__(self, why: str, slow: bool = False, stay_away: Optional[float] = None) -> None:
        super().__init__(why)
        self.slow = slow
        """Somebody may be there, but no answer came in time."""
        self.stay_away = stay_away
        """Seconds that the coordinator asks for."""


class Backoff:
    """The pauses of one connection; each is spread, so that many pods do not come back together."""

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE

    def reset(self) -> None:
        self._pause = FIRST_PAUSE

    def after(self, error: Optional[Unreachable] = None) -> float:
        """Seconds until the next try; without an error: after an answer that came too soon."""
        if error is not None and error.stay_away is not None:
            return error.stay_away * random.uniform(1.0, 2.0)
        slow = error is not None and error.slow
        pause = min(self._pause, LONGEST_WHILE_SLOW if slow else LONGEST_PAUSE)
        self._pause = pause * (4 if slow else 2)
        return pause * random.uniform(0.5, 1.0)
