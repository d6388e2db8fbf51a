"""Which tasks a step learns from, and with which examples: a pure function of the recipe's seed and the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trireme_api.fewshot import tasks_of
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.order import derive, permute, shuffled
from trireme_trainer.fewshot.tasks import FAMILIES, Examples, TaskFamily

_SPLIT, _ORDER, _TRAIN, _SUPPORT, _QUERY = range(5)
"""Purposes of keys."""


@dataclass(frozen=True)
class EpisodeBatch(Batch):
    """Examples of one task after those of another: rows are [episodes · examples]."""

    tasks: list[int | None]
    """By episode; None fills up: all its targets are ignored."""


class Episodes:
    """All tasks of a recipe, split in those to train on and those held out; `sample(n)` is episode n of the run.

    Tasks are taken in an order drawn per (seed, epoch), their examples drawn anew each time: they do not run out.
    Raises DataError for rows too short for the tasks, or where all tasks are held out.
    """

    def __init__(self, family: TaskFamily, *, examples: int, held_out: int, seed: int) -> None:
        self.family = family
        self.examples = examples
        self.seed = seed
        order = shuffled(len(family.tasks), derive(seed, _SPLIT)).tolist()
        if held_out >= len(order):
            raise DataError(
                f"fewShot.heldOutTasks: {family.name} has {len(order)} tasks at this length; hold out at most "
                f"{len(order) - 1}"
            )
        self.held_out: list[int] = sorted(order[:held_out])
        self.trained: list[int] = sorted(order[held_out:])
        self.vocabulary_size = family.vocabulary_size
        self.tokenizer: str | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Episodes:
        name, spec = tasks_of(recipe.data.sources[0].path), recipe.episodes
        assert name is not None
        try:
            family = FAMILIES[name](recipe.data.sequence_length)
        except ValueError as error:
            raise DataError(f"data.sequenceLength: {error}") from None
        return cls(family, examples=spec.examples, held_out=spec.held_out_tasks, seed=recipe.seed)

    def sample(self, number: int) -> tuple[int, Examples]:
        """Task and examples of episode `number` ≥ 0."""
        epoch, place = divmod(number, len(self.trained))
        task = self.trained[permute(place, len(self.trained), derive(self.seed, _ORDER, epoch))]
        return task, self.family.examples(task, self.examples, _random(self.seed, _TRAIN, number))

    def support(self, task: int, count: int, draw: int = 0) -> Examples:
        """The first `count` of a task's examples to adapt with: more of them begin with the fewer. Another `draw` gives
        others."""
        return self.family.examples(task, count, _random(self.seed, _SUPPORT, task, draw))

    def queries(self, task: int, count: int) -> Examples:
        """Examples of a task to predict."""
        return self.family.examples(task, count, _random(self.seed, _QUERY, task))

    def supports(self, tasks: list[int], count: int, draw: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`support` of each task, one after the other: tokens and targets, [tasks · count, T]."""
        return joined([self.support(task, count, draw) for task in tasks], device)

    def all_queries(self, tasks: list[int], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`queries` of each task, one after the other: tokens and targets, [tasks · count, T]."""
        return joined([self.queries(task, count) for task in tasks], device)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the order and content of episodes; plain JSON, kept with a checkpoint."""
        return {
            "tasks": self.family.name, "seed": self.seed, "sequenceLength": self.family.length,
            "examples": self.examples, "heldOutTasks": len(self.held_out),
        }  # fmt: skip

    def changes_since(self, saved: dict[str, Any]) -> list[str]:
        """How these episodes differ from an `identity` kept earlier, one line each."""
        now = self.identity
        return [f"{name} was {saved.get(name)}, is {now[name]}" for name in now if saved.get(name) != now[name]]


class EpisodeBatches(Batches):
    """One rank's episodes of each step, whole tasks on one rank. `batch.micro` sequences are at least one episode."""

    def __init__(self, episodes: Episodes, recipe: Recipe, rank: int, world: int, pin_memory: bool = False) -> None:
        self.episodes = episodes
        super().__init__(recipe.dealt(world), rank, pin_memory)

    def make(self, indices: list[int | None]) -> EpisodeBatch:
        drawn = [None if index is None else self.episodes.sample(index) for index in indices]
        blank = self.episodes.family.examples(self.episodes.trained[0], self.episodes.examples, _random(0))
        blank.targets.fill(-100)
        rows = [blank if one is None else one[1] for one in drawn]
        tokens, targets = joined(rows)
        return EpisodeBatch(tokens, targets, [None if one is None else one[0] for one in drawn])


def joined(several: list[Examples], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and targets of examples, those of one after those of another."""
    tokens = torch.from_numpy(np.concatenate([examples.tokens for examples in several]))
    targets = torch.from_numpy(np.concatenate([examples.targets for examples in several]))
    return tokens.to(device), targets.to(device)


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(derive(*key)))
