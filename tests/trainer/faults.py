"""How a rank of a test misbehaves: each is called in the rank before training, with its number."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trireme_api.protocol import Env
from trireme_trainer.checkpoint import Checkpointer, MemoryFolder, MemoryTier
from trireme_trainer.checkpoint.saving import Saver
from trireme_trainer.data.batches import Batch, Batches
from trireme_trainer.objectives.causal_lm import CausalLM
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.optimization.stability import Judgement, Stability
from trireme_trainer.parallel.collectives import CollectiveLog


def nan_in_step_3(rank: int) -> None:
    """One number of rank 1's gradients becomes NaN in the third step; losses stay finite."""
    if rank != 1:
        return
    plain, calls = Optimizer.clip, []

    def clip(self: Optimizer, loss_scale: Tensor | None = None) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            gradient = self._parameters[0].grad
            assert isinstance(gradient, DTensor)
            gradient.to_local()[0, 0] = float("nan")
        return plain(self, loss_scale)

    Optimizer.clip = clip  # type: ignore[method-assign]


def nan_from_step_3(rank: int) -> None:
    """Rank 1's loss becomes NaN from the third step on; its gradients stay finite. Six micro-batches make two steps."""
    if rank != 1:
        return
    plain, calls = CausalLM.__call__, []

    def loss(self: CausalLM, *arguments: Any) -> Tensor:
        calls.append(1)
        value = plain(self, *arguments)
        return value * float("nan") if len(calls) > 6 else value

    CausalLM.__call__ = loss  # type: ignore[method-assign]


def forget_moments(rank: int) -> None:
    """Of a loaded checkpoint only the weights and the number of steps are kept."""
    plain = Optimizer.loaded

    def loaded(self: Optimizer, state: dict[str, Any]) -> None:
        plain(self, state)
        for kind in ("exp_avg", "exp_avg_sq"):
            for moments in state[kind].values():
                moments.zero_()

    Optimizer.loaded = loaded  # type: ignore[method-assign]


def watch_storage(rank: int) -> None:
    """Notes each file of a committed checkpoint in storage that this rank opens until it has resumed.

    Retention reads manifests later, after a save: that is none of a restart's business.
    """
    notes = os.path.join(os.environ["TRIREME_LOG_DIR"], f"storage-reads-{rank}")
    target = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str) or resumed:
            return
        if re.search(r"/checkpoints/step-\d+/", arguments[0]):
            os.write(target, arguments[0].encode() + b"\n")

    plain, resumed = Saver.resume, []

    def resume(self: Saver, reporter: Any) -> int:
        done = plain(self, reporter)
        resumed.append(done)
        return done

    Saver.resume = resume  # type: ignore[method-assign]
    sys.addaudithook(opened)


def die_in_memory_save(rank: int) -> None:
    """Rank 1 ends with SIGKILL at stage $DIE_AT of its third save in memory."""
    if rank != 1:
        return
    plain = MemoryTier.__init__

    def init(self: MemoryTier, *arguments: Any, **named: Any) -> None:
        seen: list[str] = []

        def on_stage(stage: str) -> None:
            seen.append(stage)
            if stage == os.environ["DIE_AT"] and seen.count(stage) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        plain(self, *arguments, **named, on_stage=on_stage)

    MemoryTier.__init__ = init  # type: ignore[method-assign]


def memory_is_full_on_rank_1(rank: int) -> None:
    """As tmpfs says it when its size limit is reached."""
    if rank != 1:
        return

    def full(self: MemoryFolder, key: str, size: int) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    MemoryFolder.draft = full  # type: ignore[method-assign]


def sleeps_in_step_8(rank: int) -> None:
    """Rank 1 does not come back from its eighth step's data."""
    if rank == 1:
        _before_batches(lambda step: time.sleep(600) if step == 7 else None)


def slow(rank: int) -> None:
    """Rank 1 takes a quarter of a second longer for each step."""
    if rank == 1:
        _before_batches(lambda _: time.sleep(0.25))


def _before_batches(do: Callable[[int], None]) -> None:
    plain = Batches.micro_batches

    def micro_batches(self: Batches, step: int) -> Any:
        do(step)
        return plain(self, step)

    Batches.micro_batches = micro_batches  # type: ignore[method-assign]


def noise_in_batch_9(rank: int) -> None:
    """Batch 9 of the data (step 10, undisturbed) is noise on every rank: finite, and nothing like text."""
    _noise(rank, {9})


def noise_in_batches_9_and_13(rank: int) -> None:
    _noise(rank, {9, 13})


def noise_in_batch_9_told_a_step_late(rank: int) -> None:
    """As on a GPU, where the host reads a step's numbers while the next one is computed."""
    from trireme_trainer import train

    train.steps_behind = lambda device: 1
    _noise(rank, {9})


def noise_from_batch_9(rank: int) -> None:
    """From batch 9 on there is nothing but noise."""
    _noise(rank, range(9, 10_000))


def _noise(rank: int, steps: Collection[int]) -> None:
    plain = Batches._make

    def make(self: Batches, step: int) -> list[Batch]:
        batches = plain(self, step)
        if step not in steps:
            return batches
        generator = torch.Generator().manual_seed(1000 * step + rank)

        def noise(like: Tensor) -> Tensor:
            return torch.randint(300, 512, like.shape, generator=generator)

        return [Batch(noise(batch.tokens), noise(batch.targets)) for batch in batches]

    Batches._make = make  # type: ignore[method-assign]


def overflow_in_steps_3_and_4(rank: int) -> None:
    """One of rank 1's gradients overflows in these steps; every rank writes down its loss scaler after each step."""
    _record_scaler(rank)
    plain, calls = Optimizer.clip, []

    def clip(self: Optimizer, loss_scale: Tensor | None = None) -> Tensor:
        calls.append(1)
        if rank == 1 and len(calls) in (3, 4):
            gradient = self._parameters[0].grad
            assert isinstance(gradient, DTensor)
            gradient.to_local()[0, 0] = float("inf")
        return plain(self, loss_scale)

    Optimizer.clip = clip  # type: ignore[method-assign]


def _record_scaler(rank: int) -> None:
    plain = Stability.judge
    path = Path(os.environ[Env.LOG_DIR]) / f"scaler-{rank}.jsonl"

    def judge(self: Stability, loss: Tensor, gradient_norm: Tensor) -> Judgement:
        judged = plain(self, loss, gradient_norm)
        assert self.scaler is not None
        with path.open("a") as file:
            file.write(json.dumps(self.scaler.saved()) + "\n")
        return judged

    Stability.judge = judge  # type: ignore[method-assign]


def slow_data(rank: int) -> None:
    """Every step waits 0.2 s for its data."""
    plain = Batches._take

    def take(self: Batches, step: int) -> list[Batch]:
        time.sleep(0.2)
        return plain(self, step)

    Batches._take = take  # type: ignore[method-assign]


def slow_data_and_slow_save(rank: int) -> None:
    """And training stands still for 0.3 s at every save."""
    slow_data(rank)
    plain = Checkpointer.save

    def save(self: Checkpointer, *arguments: Any) -> None:
        time.sleep(0.3)
        plain(self, *arguments)

    Checkpointer.save = save  # type: ignore[method-assign]


def another_order_on_rank_1(rank: int) -> None:
    """Rank 1's log has its first two collectives swapped: the real thing would hang, or mix up buffers."""
    if rank != 1:
        return
    plain = CollectiveLog.stop

    def stop(self: CollectiveLog) -> None:
        plain(self)
        self.entries[:2] = reversed(self.entries[:2])

    CollectiveLog.stop = stop  # type: ignore[method-assign]
