"""Agreement between ranks on one gloo group: what one rank runs into, all ranks raise. One process needs none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from trireme_trainer.checkpoint.errors import CheckpointError, SaveFailed

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for the slowest to write or to verify its part."""


class _Failed:
    def __init__(self, rank: int, error: BaseException) -> None:
        own = isinstance(error, CheckpointError)
        self.kind: type[CheckpointError] = type(error) if isinstance(error, CheckpointError) else SaveFailed
        self.text = str(error) if own else f"rank {rank}: {describe(error)}"


class Ranks:
    """The ranks of a job as checkpointing sees them; rank 0 of the group coordinates."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a gloo group of all ranks used by nobody else; None makes one (collective), or none if alone."""
        self.group = group
        self._owned = False
        if group is None and dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self._owned = True
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.world = dist.get_world_size(self.group) if self.group is not None else 1

    def everywhere(self, run: Callable[[], T]) -> list[T]:
        """Runs on every rank and gives every rank all results; raises on all ranks when any failed."""
        try:
            mine: Any = run()
        except Exception as error:
            mine = _Failed(self.rank, error)
        everyone: list[Any] = [mine]
        if self.group is not None:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, mine, group=self.group)
        _raise(everyone)
        return everyone

    def everywhere_own(self, run: Callable[[], T]) -> T:
        """Runs on every rank, and each keeps its own result; raises on all ranks when any failed."""
        kept: list[T] = []
        self.everywhere(lambda: kept.append(run()))
        return kept[0]

    def on_first(self, run: Callable[[], T]) -> T:
        """Runs on rank 0 and gives every rank the result; raises on all ranks when it failed."""
        answer: list[Any] = [None]
        if self.rank == 0:
            try:
                answer = [run()]
            except Exception as error:
                answer = [_Failed(0, error)]
        if self.group is not None:
            dist.broadcast_object_list(answer, src=dist.get_global_rank(self.group, 0), group=self.group)
        _raise(answer)
        result: T = answer[0]
        return result

    def close(self) -> None:
        if self._owned and self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def describe(error: BaseException) -> str:
    """One line. torch's CheckpointException carries what each rank ran into: that, not its repr."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return "; ".join(f"rank {rank}: {describe(wrapped[0])}" for rank, wrapped in sorted(failures.items()))
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def _raise(answers: list[Any]) -> None:
    failed = [answer for answer in answers if isinstance(answer, _Failed)]
    if failed:
        raise failed[0].kind("; ".join(dict.fromkeys(f.text for f in failed)))
