"""The goodput ledger as it stands in status: every second of a job in exactly one state."""

from __future__ import annotations

from pydantic import Field

from trireme_api.protocol import SPENT_STATES
from trireme_api.schema import Status

LEDGER_STATES = ("queued", "pulling", "starting", *SPENT_STATES, "suspended", "waiting")
"""In the order in which a job goes through them."""
OUTSIDE_THE_RUN = frozenset({"queued", "suspended", "waiting"})
"""No part of the elapsed time that the ratio is taken of: the job holds no nodes and nobody mends anything."""


class SavedMark(Status):
    """How much of an attempt's step time had passed when a checkpoint was taken."""

    step: int
    seconds: float


class AttemptSeconds(Status):
    """One attempt, from the end of the one before (waiting for nodes included) to its own end."""

    attempt: int
    seconds: dict[str, float] = Field(default_factory=dict)
    """By state, three decimals."""
    from_step: int | None = None
    """Optimiser steps done when its loop began, as its ranks tell."""
    step: int | None = None
    """The last of its steps that still counts: lowered when a later attempt resumes from before it."""
    lost_steps: int = 0
    saves: list[SavedMark] = Field(default_factory=list)
    told: dict[str, float] = Field(default_factory=dict)
    """The ranks' own figures that are booked already; of a running attempt only."""
    unexplained: float = 0.0
    """Running time that no report has explained yet; booked under `unexplainedAs` till then."""
    unexplained_as: str = ""


class GoodputStatus(Status):
    ratio: float | None = None
    """Effective training time (Llama 3, 2407.21783 §3.3.4): step / all time in which it held nodes, 0 to 1."""
    summary: str | None = None
    """The same for the printer column."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """By state, up to `since`: queued, pulling, starting, init, compile, data-wait, step, checkpoint-blocked, eval,
    recovering, lost, suspended, waiting (for data). They sum to the time from the job's start to `since`."""
    lost_steps: int = 0
    """Optimiser steps that had to be done again."""
    state: str | None = None
    """What time goes into since `since`; `running` is divided as the ranks report. Absent once the job has ended."""
    since: str | None = None
    attempts: list[AttemptSeconds] = Field(default_factory=list)
    """The newest ones."""
    older: AttemptSeconds | None = None
    """All before them in one row, with the number of the newest among them."""
