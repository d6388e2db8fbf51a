"""How far behind the operator is, and whom the coordinator turns away for it.

Reports beyond what there is time for would make all of them late, and an agent that got no answer in time comes again,
with a handshake on top. So some are told at once, for a fraction of the cost of an answer, to come later. What agents
have to say that is new (a failure, a state) is heard before figures and polls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

BEAT_SECONDS = 0.25
LATE_SECONDS = 2.0
"""From here on figures and polls are turned away."""
VERY_LATE_SECONDS = 8.0
"""And from here on news, too: agents wait ten seconds for an answer."""
LONGEST_AWAY = 15
"""Agents take up to twice as long, so that they do not come back together."""
NEWS_AWAY = 5
REVIEW_AWAY = 2
MAX_REVIEWS = 200
"""Token reviews under way; with more, the last would be answered when its agent has given up."""


class Load:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_at: float | None = None
        self._late = 0.0

    def beat(self) -> None:
        """Called by the event loop every BEAT_SECONDS, or as soon after that as it gets to it."""
        self._late = max(self._overdue(), self._late / 2)
        self._beat_at = self._clock()

    @property
    def late(self) -> float:
        """Seconds that what is due waits for its turn in the event loop: of now, and what is left of the last ones."""
        return max(self._overdue(), self._late)

    def _overdue(self) -> float:
        return max(0.0, self._clock() - self._beat_at - BEAT_SECONDS) if self._beat_at is not None else 0.0

    def stay_away(self, news: bool, reviews: int) -> int:
        """Seconds after which a report is to come again; 0: it is answered now. `reviews`: those under way, if it
        takes another."""
        if self.late > (VERY_LATE_SECONDS if news else LATE_SECONDS):
            return NEWS_AWAY if news else min(LONGEST_AWAY, math.ceil(3 * self.late))
        return REVIEW_AWAY if reviews >= MAX_REVIEWS else 0
