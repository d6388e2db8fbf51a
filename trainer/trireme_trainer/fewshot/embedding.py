"""A task's embedding as an input token, and where embeddings begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trireme_trainer.families import LanguageModel
from trireme_trainer.fewshot.tasks import TASK

Begin = Literal["reset", "persist", "compositional"]


@contextmanager
def task_token(model: LanguageModel, z_BD: Tensor) -> Iterator[None]:
    """Inside, `z_BD` [B, width of the token table] stands in row b of a batch wherever its token is TASK.

    Replaces the token table's output, before positions, so that any family whose table is `embed_tokens` takes part
    and a token table's row TASK learns nothing.
    """

    def replace(table: nn.Module, inputs: tuple[Tensor, ...], out_BTD: Tensor) -> Tensor:
        here_BT1 = (inputs[0] == TASK)[..., None]
        return torch.where(here_BT1, z_BD.to(out_BTD.dtype)[:, None, :], out_BTD)

    table: Any = model.get_submodule("embed_tokens")
    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


class TaskEmbeddings:
    """Where the embedding of a task begins, and what is kept of it.

    One table, fp32, the same on every rank: a row per task (persist) or per primitive (compositional), none for reset.
    A task's embedding is the sum of its rows. A step on the embedding is a step on each of its rows of 1/rows the
    size: gradient descent on the rows, its rate divided by their number.
    """

    def __init__(self, begin: Begin, tasks: list[tuple[int, ...]], primitives: int, width: int) -> None:
        self._begin: Begin = begin
        rows: dict[Begin, list[tuple[int, ...]]] = {
            "reset": [() for _ in tasks],
            "persist": [(task,) for task in range(len(tasks))],
            "compositional": tasks,
        }
        self._rows = rows[begin]
        count = {"reset": 0, "persist": len(tasks), "compositional": primitives}[begin]
        self.table = torch.zeros(count, width)
        self.moved = torch.zeros(count, width + 1)
        """[rows, width + 1]: sum of what this rank's tasks moved a row by since the last `apply`, and their number."""

    def to(self, device: torch.device) -> TaskEmbeddings:
        self.table, self.moved = self.table.to(device), self.moved.to(device)
        return self

    @property
    def keeps(self) -> bool:
        return self._begin != "reset"

    def of(self, tasks: list[int]) -> Tensor:
        """Where the embeddings of these tasks begin, [tasks, width]."""
        return torch.stack([self.table[list(self._rows[task])].sum(0) for task in tasks])

    def unseen(self, task: int, trained: list[int]) -> Tensor:
        """Where that of a task begins that was never trained on, [width]: zero; the mean of the trained tasks' where
        each keeps its own; the sum of its primitives'."""
        if self._begin == "persist":
            return self.of(trained).mean(0)
        return self.of([task])[0]

    def went(self, task: int, by_D: Tensor) -> None:
        """The task's embedding moved by `by_D`."""
        for row in self._rows[task]:
            self.moved[row, :-1] += by_D / len(self._rows[task])
            self.moved[row, -1] += 1

    def apply(self, moved: Tensor, skip: Tensor) -> None:
        """`moved` summed over ranks: each row goes by the mean of its tasks, or stays where `skip` is 1."""
        self.table += (moved[:, :-1] / moved[:, -1:].clamp(min=1)).to(self.table.dtype) * (1 - skip)
        self.moved.zero_()

    def reset(self) -> None:
        self.table.zero_()
        self.moved.zero_()
