"""A recipe on a number of devices: who holds what, and how often it is gone through in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trireme_api.devices import Board
from trireme_api.families import ModelConfig, check_recipe, resolve
from trireme_api.families.activations import Pass
from trireme_api.families.memory import Moment, Spread, compute_bytes, peak
from trireme_api.fewshot import most_answers, tasks_of
from trireme_api.recipe import Recipe
from trireme_api.share import Share

USABLE = 0.9
"""Of a device's memory. The rest: CUDA's context, NCCL's buffers, what the allocator cannot use. An assumption."""


@dataclass(frozen=True)
class Setting:
    recipe: Recipe
    config: ModelConfig
    """Where the model grows: as it is in the end."""
    ranks: int
    per_node: int
    """Ranks of one machine."""
    board: Board | None
    """None: ranks on CPUs."""

    @classmethod
    def of(cls, recipe: Recipe, ranks: int, per_node: int, board: Board | None, path: str = "") -> Setting:
        """Raises InvalidSpec naming the field."""
        config = check_recipe(recipe, path)
        recipe.parallelism.check_ranks(ranks, path)
        setting = cls(recipe, config, ranks, min(per_node, ranks), board)
        return setting.sessions[-1][0] if recipe.stream is not None else setting

    @property
    def sessions(self) -> list[tuple[Setting, int]]:
        """With the model of each size that the run trains, from the first on, and its optimiser steps: with `anytime` a
        model may grow between sessions, else it has one size."""
        stream, base = self.recipe.stream, resolve(self.recipe.model)
        if stream is None or not base.grows:
            return [(self, self.recipe.total_steps)]
        steps: dict[int, int] = {}
        for session in stream:
            steps[session.growths] = steps.get(session.growths, 0) + session.end_step - session.first_step
        return [(replace(self, config=base.grown(times)), count) for times, count in steps.items()]

    def changed(self, *, ranks: int | None = None, **fields: Any) -> Setting:
        """With other fields of the recipe, or more ranks."""
        ranks = ranks or self.ranks
        return replace(self, recipe=self.recipe.model_copy(update=fields), ranks=ranks)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    @property
    def share(self) -> Share:
        """In units of the recipe's `together` sequences."""
        return self.recipe.dealt(self.ranks // self.recipe.parallelism.tensor)

    @property
    def micro_sequences(self) -> int:
        return self.share.micro_sequences * self.recipe.together

    @property
    def passes(self) -> int:
        """Forward passes of one step, each with a backward pass, on the rank with the most."""
        each = self.recipe.episodes.passes if self.recipe.objective == "few-shot" else 1
        return self.share.micro_batches * each

    @property
    def shards(self) -> int:
        return self.recipe.parallelism.shard_ranks(self.ranks, self.per_node)

    @property
    def spread(self) -> Spread:
        parallelism = self.recipe.parallelism
        each = self.recipe.episodes.weight_passes if self.recipe.objective == "few-shot" else 1
        return Spread(
            shards=self.shards,
            experts=parallelism.expert,
            tensor=parallelism.tensor,
            reshards=parallelism.reshards_after_forward,
            prefetch=parallelism.prefetch.backward,
            reductions=self.share.micro_batches * each,
            accumulates_locally=parallelism.accumulates_locally,
            activation_checkpointing=self.recipe.activation_checkpointing,
        )

    @property
    def micro_batch(self) -> Pass:
        length, low = self.recipe.data.sequence_length, compute_bytes(self.recipe.precision)
        on_gpu = self.board is not None
        tokens = self.micro_sequences * length
        return Pass(
            tokens, length, low, mask_bytes=1 if on_gpu else low, fused_dropout=on_gpu,
            tensor=self.recipe.parallelism.tensor,
        )  # fmt: skip

    @property
    def places(self) -> int | None:
        """Of a micro-batch's tokens those with logits; None: all."""
        recipe, length = self.recipe, self.recipe.data.sequence_length
        match recipe.objective:
            case "masked-lm":
                return self.micro_sequences * recipe.masks.places(length)
            case "few-shot":
                tasks = tasks_of(recipe.data.sources[0].path)
                assert tasks is not None
                return self.micro_sequences * most_answers(tasks, length)
        return None

    def memory(self) -> Moment:
        """Of the fullest rank, at the fullest moment."""
        return peak(self.config, self.spread, self.micro_batch, self.places)

    @property
    def room(self) -> float | None:
        """Bytes of a device that a run may use."""
        return None if self.board is None else USABLE * self.board.gibibytes * 2**30

    def fits(self) -> bool | None:
        return None if self.room is None else self.memory().total <= self.room
