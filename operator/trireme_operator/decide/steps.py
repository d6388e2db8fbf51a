"""Moves that several phases share: a new attempt, the end, giving the nodes back."""

from __future__ import annotations

from trireme_api.job import CheckpointStatus, Phase

from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.draft import Draft


def begin_attempt(draft: Draft) -> None:
    status = draft.status
    status.attempt += 1
    status.attempt_started_at = stamp(draft.now)
    status.sizing.target = status.sizing.since = None
    if status.stream is not None and draft.spec.recipe is not None and draft.spec.recipe.anytime is not None:
        status.stream.told = draft.spec.recipe.anytime.arrived
    known = status.last_checkpoint
    status.resume_from = CheckpointStatus(step=known.step, path=known.path) if known else None


def completed(draft: Draft) -> str:
    progress = draft.status.progress
    return f"all ranks ended well at step {progress.step}" if progress else "all ranks ended well"


def end(draft: Draft, phase: Phase, reason: str, message: str) -> None:
    status = draft.status
    status.completion_time = stamp(draft.now)
    status.stopping_since = None
    if status.progress is not None:
        status.progress.eta = status.progress.remaining = None
    draft.enter(phase, reason, message)
    draft.note(reason, message, warning=phase == Phase.FAILED)


def give_back(draft: Draft) -> None:
    """No slots: every pod is garbage from now on."""
    draft.status.slots = []
    draft.status.draining = []
    draft.status.admitted_spec = None
    draft.status.stopping_since = None
    draft.status.sizing.target = draft.status.sizing.since = None


def past_active_deadline(draft: Draft) -> bool:
    limit, status = draft.spec.run_policy.active_deadline_seconds, draft.status
    began = seconds(status.admitted_at)
    if limit is None or began is None:
        return False
    ends = began + limit + status.suspended_seconds + (status.stream.waited_seconds if status.stream else 0.0)
    if draft.now < ends:
        draft.wake_at(ends)
        return False
    end(
        draft,
        Phase.FAILED,
        "DeadlineExceeded",
        f"spec.runPolicy.activeDeadlineSeconds: {limit} s are over; ranks save and stop",
    )
    return True
