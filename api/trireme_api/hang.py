"""When a gang counts as hung, and what status says of hangs and stragglers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trireme_api.schema import PositiveInt, Spec, Status


class HangPolicy(Spec):
    step_timeout: PositiveInt | Literal["auto"] = "auto"
    """Seconds without a step after which the gang counts as hung; auto: three times the median step, at least 15."""
    start_seconds: PositiveInt = 600
    """The same for whatever is no step: import, rendezvous, loading, compiling, saving, evaluating."""


class HangStatus(Status):
    """A hang that was found and is answered as soon as the stacks of its ranks are saved."""

    attempt: int
    since: str
    message: str
    slot: int
    silent: list[int] = Field(default_factory=list)
    """Slots whose agents had said nothing since the gang stood still."""


class Straggler(Status):
    """A rank that takes much longer than the others for the same work; reported, not killed."""

    rank: int
    pod: str
    node: str = ""
    own_seconds: float
    """Per step, waiting for the others left out; a moving average."""
    others_seconds: float
    """The same, median of the other ranks."""
    since: str
