"""Mega-batches, waiting time and replay: which rows a learner may train on, and when (2106.09563)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Session:
    """One training: what is new since the last one, and what is replayed with it, as rows of the data set."""

    number: int
    """From 1."""
    train: Rows
    validation: Rows
    replayed: int
    """How many rows of `train` are of earlier sessions."""


@dataclass(frozen=True)
class Plan:
    """How a stream is cut and waited for."""

    mega_batches: int
    wait: int = 1
    """Mega-batches that are collected before each training: 1 is the paper's greedy learner, all of them the tardy."""
    replay: float = 0.0
    """Share of all earlier rows that each training sees again."""
    validation: float = 0.1
    """Share of each mega-batch held back to choose the best epoch by."""

    def __post_init__(self) -> None:
        if self.mega_batches < 1:
            raise ValueError(f"mega_batches: {self.mega_batches} is not a stream; give at least 1")
        if not 1 <= self.wait <= self.mega_batches:
            raise ValueError(f"wait: {self.wait} of {self.mega_batches} mega-batches; give 1 to {self.mega_batches}")
        if not 0 <= self.replay <= 1:
            raise ValueError(f"replay: {self.replay} is no share of the past; give 0 to 1")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation: {self.validation} is no share of a mega-batch; give one between 0 and 1")


def cut(samples: int, mega_batches: int, seed: int = 432) -> list[Rows]:
    """Rows of each mega-batch: a permutation cut into parts whose sizes differ by one at most. Seed and procedure of
    the released code, so the same rows."""
    if samples < 2 * mega_batches:
        raise ValueError(
            f"mega_batches: {samples} samples in {mega_batches} leave a mega-batch without training or validation "
            f"rows; cut into {samples // 2} at most"
        )
    order = np.random.RandomState(seed).permutation(samples).astype(np.int64)
    return list(np.array_split(order, mega_batches))


def stream(samples: int, plan: Plan, seed: int = 0) -> Iterator[Session | None]:
    """One item per arriving mega-batch: the session it sets off, or None while the learner waits. The last mega-batch
    always sets one off.

    A mega-batch's validation rows are a function of (seed, its number), whatever the waiting time (ours; the released
    code knows waiting only as larger mega-batches). Replayed rows are drawn anew for each session, training and
    validation rows apart, so none is ever both.
    """
    new: tuple[list[Rows], list[Rows]] = ([], [])
    past: tuple[list[Rows], list[Rows]] = ([], [])
    number = 0
    for t, rows in enumerate(cut(samples, plan.mega_batches), start=1):
        shuffled = np.random.RandomState([seed, t]).permutation(rows)
        held = max(1, round(plan.validation * len(rows)))
        new[0].append(shuffled[held:])
        new[1].append(shuffled[:held])
        if t % plan.wait and t < plan.mega_batches:
            yield None
            continue
        number += 1
        random = np.random.RandomState([seed, number, 1])
        again = [_draw(kept, plan.replay, random) for kept in past]
        train, validation = (np.concatenate([*fresh, old]) for fresh, old in zip(new, again, strict=True))
        yield Session(number, train, validation, len(again[0]))
        for kept, fresh in zip(past, new, strict=True):
            kept.extend(fresh)
            fresh.clear()


def _draw(kept: list[Rows], share: float, random: np.random.RandomState) -> Rows:
    rows = np.concatenate(kept) if kept else np.empty(0, np.int64)
    return random.permutation(rows)[: round(share * len(rows))]
