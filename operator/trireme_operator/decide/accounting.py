"""Figures in status: progress, time left, checkpoints. Pure functions of status and reports."""

from __future__ import annotations

from collections.abc import Sequence

from trireme_api.job import CheckpointStatus, ProgressStatus, TrainingJobSpec, TrainingJobStatus
from trireme_api.protocol import Progress

from trireme_operator.decide.clock import duration, stamp
from trireme_operator.decide.gang import Place
from trireme_operator.decide.hangs import step_seconds


def best_step(status: TrainingJobStatus) -> int:
    """The furthest step ever reached: what a failure is measured against."""
    reached = status.progress.best_step if status.progress else 0
    return max(reached, status.last_checkpoint.step if status.last_checkpoint else 0)


def account(status: TrainingJobStatus, spec: TrainingJobSpec, found: Sequence[Place], now: float) -> None:
    """Brings progress and checkpoint of `status` up to what the agents have reported."""
    _progress(status, spec, found, now)
    _checkpoint(status, found, now)


def _progress(status: TrainingJobStatus, spec: TrainingJobSpec, found: Sequence[Place], now: float) -> None:
    told: Progress | None = None
    for place in found:  # slot 0 holds global rank 0
        if place.heard and place.heard.report.attempt == status.attempt and place.heard.report.progress:
            told = place.heard.report.progress
            break
    if told is None:
        return
    total = told.total_steps or (spec.recipe.total_steps if spec.recipe else None)
    left = seconds_left(told, total, spec)
    status.progress = ProgressStatus(
        step=told.step,
        best_step=max(told.step, status.progress.best_step if status.progress else 0),
        total_steps=total,
        tokens=told.tokens,
        loss=_rounded(told.loss, 4),
        tokens_per_second=_rounded(told.tokens_per_second, 1),
        tflops=_rounded(told.tflops, 4),
        mfu=_rounded(told.mfu, 4),
        step_seconds=_rounded(step_seconds(found, status), 4),
        eta=stamp(now + left) if left is not None else None,
        remaining=duration(left) if left is not None else None,
    )


def seconds_left(told: Progress, total_steps: int | None, spec: TrainingJobSpec) -> float | None:
    """Remaining steps at the reported speed; None while speed or end is not known."""
    if total_steps is None or not told.tokens_per_second:
        return None
    per_step: float | None = None
    if spec.recipe is not None:
        per_step = spec.recipe.batch.tokens
    elif told.tokens and told.step:
        per_step = told.tokens / told.step
    if per_step is None:
        return None
    return max(0, total_steps - told.step) * per_step / told.tokens_per_second


def _checkpoint(status: TrainingJobStatus, found: Sequence[Place], now: float) -> None:
    for place in found:
        told = place.heard.report.checkpoint if place.heard else None
        if told is not None and (status.last_checkpoint is None or told.step > status.last_checkpoint.step):
            status.last_checkpoint = CheckpointStatus(step=told.step, path=told.path, seen_at=stamp(now))


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None  # JSON and the CRD have no NaN
    return round(value, digits)
