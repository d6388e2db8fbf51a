"""The logbook that a job carries in its status: what the operator decided, and when.

Events say the same, but a cluster forgets them after an hour; a night's failures must still be readable in the morning.
"""

from __future__ import annotations

from trireme_api.schema import Status

MAX_DECISIONS = 40
MAX_MESSAGE = 300
"""Characters; a list of this size adds at most about 15 kB to the object."""


class DecisionRecord(Status):
    at: str
    reason: str
    message: str = ""
    warning: bool = False
    count: int = 1
    """How often it was decided without anything else in between."""


def noted(
    before: list[DecisionRecord], at: str, reason: str, message: str, warning: bool = False
) -> list[DecisionRecord]:
    """The logbook with one more decision. The first stays, for it says when the job began; of the others the newest."""
    text = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
    last = before[-1] if before else None
    if last is not None and (last.reason, last.message) == (reason, text):
        return [*before[:-1], last.model_copy(update={"at": at, "count": last.count + 1})]
    grown = [*before, DecisionRecord(at=at, reason=reason, message=text, warning=warning)]
    return grown if len(grown) <= MAX_DECISIONS else [grown[0], *grown[-(MAX_DECISIONS - 1) :]]
