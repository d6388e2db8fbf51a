"""Anytime learning inside one run (ALMA, 2106.09563): which mega-batches make which session, and where its steps end.

Pure arithmetic of the recipe, the same for operator, trainer and command line: nothing of it is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field

from trireme_api.schema import PositiveInt, Spec, Status

NUMBER = "{n}"
"""In the path of a source: the mega-batch's number, from 1."""


class AnytimeSpec(Spec):
    """A stream of mega-batches instead of data that are all there (ALMA, 2106.09563). Each path in data.sources has
    `{n}` in it, the number of the mega-batch, from 1. Mega-batches are trained on in sessions; between two of them,
    while there is no new data, the job holds no nodes. Each mega-batch has an equal share of the steps of `until`."""

    mega_batches: PositiveInt = Field(le=10000)
    """In the whole stream."""
    arrived: int = Field(default=0, ge=0)
    """So many mega-batches, from the first on, lie complete in their directories. Whoever delivers them raises it; it
    is read live, also while the job runs. `trireme run` looks at the directories instead."""
    wait_for: PositiveInt = 1
    """New mega-batches per session (the paper's waiting time: 1 is greedy, all of them tardy)."""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """Share of a session's blocks that is drawn from earlier mega-batches, from each of them alike."""
    grow_every: int = Field(default=0, ge=0)
    """With every so many sessions the model grows before training goes on: in one of the family growing the most used
    expert of each layer is split in two; of a growing ensemble the newest member is copied, and the copy alone trained
    from then on. 0: the model keeps its size."""


class StreamStatus(Status):
    """How far a job with `recipe.anytime` has come in its stream."""

    trained: int = 0
    """Mega-batches whose sessions have ended."""
    needed: int = 0
    """Mega-batches that must have arrived for the session in turn."""
    of: int = 0
    told: int = 0
    """`arrived` when this attempt began."""
    waiting_since: str | None = None
    """While it waits for data."""
    waited_seconds: float = 0.0


@dataclass(frozen=True)
class Session:
    number: int
    """From 0."""
    new: range
    """Mega-batches, from 1, that it is the first to train on."""
    first_step: int
    end_step: int
    """Optimiser steps done when it has ended."""
    growths: int
    """How often the model has grown by the time this session trains it."""

    @property
    def seen(self) -> range:
        """Mega-batches of earlier sessions."""
        return range(1, self.new.start)


class Stream:
    """The sessions of a run of `total_steps` optimiser steps, at least one for each mega-batch."""

    def __init__(self, spec: AnytimeSpec, total_steps: int) -> None:
        self.spec = spec
        self.total_steps = total_steps
        self._sessions = -(-spec.mega_batches // spec.wait_for)

    def __len__(self) -> int:
        return self._sessions

    def session(self, number: int) -> Session:
        spec = self.spec
        before = number * spec.wait_for
        after = min(before + spec.wait_for, spec.mega_batches)
        return Session(
            number, range(before + 1, after + 1), self._end(before), self._end(after),
            number // spec.grow_every if spec.grow_every else 0,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Session]:
        return (self.session(number) for number in range(self._sessions))

    def at(self, step: int) -> Session:
        """The one in turn after `step` steps; after the end the last."""
        return next((session for session in self if step < session.end_step), self.session(self._sessions - 1))

    def begins(self, step: int) -> bool:
        """Whether a session is to begin after `step` steps; the one before it, if any, has ended."""
        return step < self.total_steps and self.at(step).first_step == step

    def trained(self, step: int) -> int:
        """Mega-batches whose sessions have ended after `step` steps."""
        return self.spec.mega_batches if step >= self.total_steps else self.at(step).new.start - 1

    def needed(self, step: int) -> int:
        """Mega-batches that must have arrived for training to go on after `step` steps."""
        return self.at(step).new.stop - 1

    def _end(self, mega_batches: int) -> int:
        return self.total_steps * mega_batches // self.spec.mega_batches


def numbered(path: str, mega_batch: int) -> str:
    return path.replace(NUMBER, str(mega_batch))
