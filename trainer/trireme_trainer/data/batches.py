"""One rank's share of each step, made ready in the background while the step before is computed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from trireme_api.recipe import Recipe
from trireme_api.share import Share as Share

from trireme_trainer.data.mixture import Mixture

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    """tokens_BT, int64."""
    targets: Tensor
    """targets_BT, int64: the token after each; −100 where it does not count (padding)."""

    def on(self, device: torch.device) -> Self:
        """On the device; a copy from pinned memory is only queued."""
        tokens, targets = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets))
        return replace(self, tokens=tokens, targets=targets)

    def shared_out(self, members: int) -> list[Batch]:
        """Of a batch made for so many members of an ensemble, the rows of each."""
        rows = zip(self.tokens.chunk(members), self.targets.chunk(members), strict=True)
        return [Batch(tokens, targets) for tokens, targets in rows]

    def pinned(self) -> Self:
        """In pinned host memory, for copies to a GPU that wait for nothing."""
        return replace(self, tokens=self.tokens.pin_memory(), targets=self.targets.pin_memory())


class Batches(ABC):
    """`micro_batches(step)` for one rank. The global batch of step s is samples [s·S, (s+1)·S), in any world.

    The next step is prefetched in a thread; any other step may be asked for at any time (resume, rollback).
    Errors of the thread (DataError) are raised by the call that needed its result.
    """

    def __init__(self, share: Share, rank: int, pin_memory: bool = False) -> None:
        if not 0 <= rank < share.world:
            raise ValueError(f"rank {rank} in a world of {share.world}")
        self.share = share
        self._mine = share.of(rank)
        self._pin = pin_memory
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self.last_wait_seconds = 0.0
        """How long the training thread stood waiting for the newest step's data."""

    @abstractmethod
    def make(self, indices: list[int | None]) -> Batch:
        """One micro-batch of the samples with these global indices; None is padding: none of its targets count."""

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimiser step `step` (from 0), tokens_BT and targets_BT alike on every rank."""
        begin = time.perf_counter()
        try:
            batches = self._take(step)
        finally:
            self.last_wait_seconds = time.perf_counter() - begin
        self._next = (step + 1, self._pool.submit(self._make, step + 1))
        return batches

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, step: int) -> list[Batch]:
        if self._next is not None:
            ready, future = self._next
            self._next = None
            if ready == step:
                return future.result()
            future.cancel()
        return self._make(step)

    def _make(self, step: int) -> list[Batch]:
        first = step * self.share.sequences
        made = [self.make([None if n is None else first + n for n in numbers]) for numbers in self._mine]
        return [batch.pinned() for batch in made] if self._pin else made


class TextBatches(Batches):
    """Blocks of a mixture: each token's target is the next.

    `further`: the same blocks in the orders of an ensemble's other members; their rows follow, member by member.
    """

    def __init__(
        self, mixture: Mixture, recipe: Recipe, rank: int, world: int, pin_memory: bool = False,
        further: Sequence[Mixture] = (),
    ) -> None:  # fmt: skip
        super().__init__(recipe.dealt(world), rank, pin_memory)
        self.mixture = mixture
        self._orders = [mixture, *further]

    def make(self, indices: list[int | None]) -> Batch:
        length = self.mixture.sequence_length
        wanted = [(order, index) for order in self._orders for index in indices]
        blocks = np.full((len(wanted), length + 1), self.mixture.end_of_document, dtype=np.int64)
        for row, (order, index) in enumerate(wanted):
            if index is not None:
                blocks[row] = order.sample(index)
        tokens = torch.from_numpy(np.ascontiguousarray(blocks[:, :-1]))
        targets = torch.from_numpy(np.ascontiguousarray(blocks[:, 1:]))
        padding = [row for row, (_, index) in enumerate(wanted) if index is None]
        targets[padding] = IGNORED
        return Batch(tokens, targets)
