"""Figures of training that goes on: what they are, and how often all jobs together may write them. Pure."""

from __future__ import annotations

from dataclasses import replace

from trireme_api.protocol import AgentState, RankReport, Report

CALM_SECONDS = 4.0
"""A rank whose heartbeat is older, without a step done, may be about to hang: that is no mere figure."""
WRITES_PER_SECOND = 50.0
"""What figures may cost the API server; with more than 250 jobs each is written more seldom than every 5 s."""


def only_figures(before: Report, after: Report) -> bool:
    """Whether a report tells only that training goes on, which can wait until figures are written next."""
    ranks = zip(before.ranks, after.ranks, strict=False)
    if after.state is not AgentState.RUNNING or not after.ranks or not all(_goes_on(*pair) for pair in ranks):
        return False
    same = replace(
        after, ranks=before.ranks, progress=before.progress, energy=before.energy, hardware=before.hardware,
        spent=before.spent,
    )  # fmt: skip
    return same == before and len(after.ranks) == len(before.ranks)


def _goes_on(before: RankReport, after: RankReport) -> bool:
    if (before.local_rank, before.pid, before.exit) != (after.local_rank, after.pid, after.exit):
        return False
    if before.step is None or after.step is None or after.step < before.step:
        return False
    return after.step > before.step or (after.heartbeat_age is not None and after.heartbeat_age < CALM_SECONDS)


def interval(wanted: float, jobs: int) -> float:
    """Seconds between writes of figures for each of so many jobs that hold nodes."""
    return max(wanted, jobs / WRITES_PER_SECOND)
