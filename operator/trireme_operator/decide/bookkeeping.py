"""Keeps the goodput ledger of a job: which state it is in, when an attempt ends, what its ranks tell. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trireme_api.job import TERMINAL, Phase, TrainingJobStatus
from trireme_api.ledger import AttemptSeconds, GoodputStatus
from trireme_api.protocol import AgentState, Spent

from trireme_operator.decide.clock import duration
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import HOLDING, Place
from trireme_operator.decide.ledger import RUNNING, Book, Row, milliseconds


def keep(draft: Draft) -> None:
    """Brings the ledger up to date where something moved: the state, the attempt, or what the ranks tell.

    Nothing moved: not a byte changes, so that a job at rest is not written for the time that passes.
    """
    before, status = draft.job.status, draft.status
    if status.start_time is None:
        return
    number = attempt_of(status)
    state = state_of(status, draft.found)
    if before.goodput is None or before.goodput.since is None:
        book = Book(milliseconds(None, draft.now), state)
        _begin(book.row(number), draft)
        status.goodput = book.status()
        return
    book = Book.of(before.goodput, draft.now)
    row = book.row(attempt_of(before))
    spent = told(before, draft.found) if row.unexplained_as else None
    ended = book.ended()
    late = ended is not None and ended.reach(_steps(ended.attempt, draft.found))
    if state == book.state and row.attempt == number and not late and not (spent is not None and row.news(spent)):
        return
    book.advance(milliseconds(None, draft.now))
    if spent is not None:
        book.explain(spent)
    failed = _failed(status, row.attempt)
    if status.phase in TERMINAL or row.attempt != number:
        row.reach(_steps(row.attempt, draft.found))
        row.close(failed)
        if status.phase == Phase.FAILED and failed and draft.spec.recipe is not None:
            # Nobody goes on from it: what was not saved is lost.
            book.lose_after(status.last_checkpoint.step if status.last_checkpoint else 0, book.rows)
    if row.attempt != number and status.phase not in TERMINAL:
        row = book.row(number)
    book.state = state
    if state == RUNNING:
        _begin(row, draft)
    after = book.status()
    _say(draft, before.goodput, after)
    status.goodput = after


def up_to(goodput: GoodputStatus, now: float) -> GoodputStatus:
    """The ledger with the time that has passed since it was written, where the job has not ended."""
    if goodput.state is None:
        return goodput
    book = Book.of(goodput, now)
    book.advance(milliseconds(None, now))
    return book.status()


def attempt_of(status: TrainingJobStatus) -> int:
    """Time spent waiting belongs to the attempt that comes of it."""
    return status.attempt if status.phase in HOLDING or status.phase in TERMINAL else status.attempt + 1


def state_of(status: TrainingJobStatus, found: Sequence[Place]) -> str | None:
    """The state that time goes into from now on, as far as the operator sees; None once the job has ended."""
    if status.phase in TERMINAL:
        return None
    if status.phase == Phase.RUNNING:
        return RUNNING
    if status.phase == Phase.RECOVERING:
        return "recovering"
    if status.phase == Phase.SUSPENDED:
        return "suspended"
    if status.phase == Phase.WAITING:
        return "waiting"
    if status.phase == Phase.SUSPENDING:
        alive = AgentState.STARTING, AgentState.RUNNING, AgentState.STOPPING
        return RUNNING if any(place.says(status.attempt, *alive) for place in found) else "suspended"
    if status.phase == Phase.STARTING:
        pods = [place.pod for place in found]
        if any(pod is None or not pod.node for pod in pods) or not pods:
            return "queued"
        return "pulling" if any(pod is not None and pod.phase == "Pending" for pod in pods) else "starting"
    return "queued"


def told(status: TrainingJobStatus, found: Sequence[Place]) -> Spent | None:
    """What the ranks of this attempt tell; slot 0 holds global rank 0."""
    for place in found:
        if place.heard is not None and place.heard.report.attempt == status.attempt and place.heard.report.spent:
            return place.heard.report.spent
    return None


def _steps(attempt: int, found: Sequence[Place]) -> int:
    """Optimiser steps that any of the pods has told of an attempt; 0 where none has."""
    return max((place.heard.steps.get(attempt, 0) for place in found if place.heard is not None), default=0)


def _begin(row: Row, draft: Draft) -> None:
    """Until its ranks tell more: a recipe's trainer begins with `init`; of a user's own script nothing is known."""
    row.unexplained_as = row.unexplained_as or ("init" if draft.spec.recipe is not None else "step")


def _failed(status: TrainingJobStatus, attempt: int) -> bool:
    failure = status.last_failure
    ended = status.phase in (Phase.RECOVERING, Phase.FAILED)
    return ended and failure is not None and failure.attempt == attempt


def _say(draft: Draft, before: GoodputStatus, after: GoodputStatus) -> None:
    """One line for each attempt that ended, one for the job."""
    last = before.attempts[-1].attempt if before.attempts else None
    row = next((row for row in after.attempts if row.attempt == last), None)
    if row is not None and (row is not after.attempts[-1] or after.state is None):
        draft.note("AttemptEnded", f"attempt {row.attempt} took {describe(row.seconds, row)}")
    if after.state is None:
        share = "nothing ran" if after.ratio is None else f"{after.summary} effective training time"
        draft.note("Goodput", f"{share} of {describe(after.seconds)}; {after.lost_steps} steps lost")


def describe(seconds: Mapping[str, float], row: AttemptSeconds | None = None) -> str:
    """`5m10s (init 8.1, step 280.3, …)`, in seconds, largest first."""
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    steps = f", steps {row.from_step} to {row.step}" if row is not None and row.step is not None else ""
    return f"{duration(sum(seconds.values()))} ({', '.join(f'{state} {value:.1f}' for state, value in parts)}){steps}"
