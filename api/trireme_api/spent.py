"""Where a rank's time went: its part of the goodput ledger.

Standard library only and Python 3.9 syntax: travels with the agent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Optional

from trireme_api.wire import Message

SPENT_STATES = ("init", "compile", "data-wait", "step", "checkpoint-blocked", "eval", "recovering", "lost")
"""What a rank's time can go into, as far as the rank itself can tell; the operator adds what lies outside of it."""


@dataclass
class Spent(Message):
    """Where a rank's time went since its process began, by its own monotonic clock: durations only, no times of day."""

    seconds: Dict[str, float] = field(default_factory=dict)
    """By state (SPENT_STATES); each second in one of them, the running one included."""
    state: str = "init"
    """The one that runs now."""
    from_step: Optional[int] = None
    """Optimiser steps done when the loop began: the step of the checkpoint it resumed from, or 0."""
    step: Optional[int] = None
    """Optimiser steps done."""
    saved_step: Optional[int] = None
    """Step of the newest checkpoint this process committed …"""
    saved_seconds: Optional[float] = None
    """… and `seconds["step"]` at that step."""


@dataclass
class Reached(Message):
    """How far the ranks of an attempt that has ended came."""

    attempt: int
    step: int
    """Optimiser steps done."""
