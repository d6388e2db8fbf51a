"""Figures in status: progress, time left, energy counted once, carbon. Pure functions of status and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trireme_api import carbon
from trireme_api.job import (
    CarbonStatus,
    CheckpointStatus,
    ProgressStatus,
    TrainingJobSpec,
    TrainingJobStatus,
)
from trireme_api.protocol import EnergyReading, Progress

from trireme_operator.clock import duration, stamp
from trireme_operator.gang import Place
from trireme_operator.hangs import step_seconds
from trireme_operator.views import Observed

_SOURCES = ("nvml", "nvml-power", "rapl", "declared", "missing")
"""Best first; a sum is as good as its weakest part."""


def best_step(status: TrainingJobStatus) -> int:
    """The furthest step ever reached: what a failure is measured against."""
    reached = status.progress.best_step if status.progress else 0
    return max(reached, status.last_checkpoint.step if status.last_checkpoint else 0)


def account(
    status: TrainingJobStatus, spec: TrainingJobSpec, found: Sequence[Place], seen: Observed, now: float
) -> None:
    """Brings progress, checkpoint, energy and carbon of `status` up to what the agents have reported."""
    _progress(status, spec, found, now)
    _checkpoint(status, found, now)
    _energy(status, seen)
    status.carbon = carbon_status(spec, status.energy.joules if status.energy.source != "missing" else None)


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


def _energy(status: TrainingJobStatus, seen: Observed) -> None:
    """A counter runs from the agent's start and is added by its difference to what was already counted of that pod.

    Pods that were replaced count too, as long as they are there: they burn until they end.
    """
    energy = status.energy
    for pod in seen.pods:
        heard = seen.heard.get(pod.uid)
        if heard is None or not heard.report.energy:
            continue
        reading = heard.report.energy
        counter = sum(part.joules for part in reading.values() if part.joules is not None)
        before = energy.by_pod.get(pod.uid, 0.0)
        others = set(energy.by_pod) - {pod.uid}
        energy.joules = round(energy.joules + max(0.0, counter - before), 1)
        energy.by_pod[pod.uid] = round(max(counter, before), 1)
        energy.source = weakest(reading, energy.source if others else None)
    # Kept until the pod is gone and its slot filled anew, so that a view that misses it once does not count it twice.
    keep = {pod.uid for pod in seen.pods} | {slot.pod_uid for slot in status.slots}
    energy.by_pod = {uid: joules for uid, joules in energy.by_pod.items() if uid in keep}


def weakest(reading: Mapping[str, EnergyReading], before: str | None = None) -> str:
    """The least trustworthy source among the components that have a number, and of what is already in the sum.

    A component without one is no part of the sum; its own metric says `missing`.
    """
    names = [part.source for part in reading.values() if part.joules is not None]
    names += [before] if before in _SOURCES[:-1] else []
    return max(names, key=lambda name: _SOURCES.index(name) if name in _SOURCES else len(_SOURCES), default="missing")


def carbon_status(spec: TrainingJobSpec, joules: float | None) -> CarbonStatus:
    """Operational carbon; grams are absent, never 0, where the energy or the grid is not known."""
    policy = spec.carbon_policy
    try:
        grid = carbon.intensity(policy.zone, policy.grams_per_kilowatt_hour)
    except carbon.UnknownZone:
        grid = None  # refused by validation; only a job admitted by another version can come here
    if grid is None:
        return CarbonStatus(pue=policy.pue)
    grams = None if joules is None else carbon.operational_grams(joules, policy.pue, grid.grams_per_kilowatt_hour)
    return CarbonStatus(
        grams=_rounded(grams, 4),
        grams_per_kilowatt_hour=grid.grams_per_kilowatt_hour,
        pue=policy.pue,
        source=grid.source,
        summary=None if grams is None else carbon.mass(grams),
    )


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None  # JSON and the CRD have no NaN
    return round(value, digits)
