"""A recipe on a number of devices: who holds what, and how often it is gone through in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trireme_api.devices import Board
from trireme_api.families import ModelConfig, check_recipe, resolve
from trireme_api.families.activations import Pass
from trireme_api.families.growing import GrowingConfig
from trireme_api.families.memory import Moment, Spread, compute_bytes, peak
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec
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
        if recipe.objective == "few-shot":
            raise InvalidSpec(f"{path}objective", "no plan is made for few-shot; it is for causal-lm and masked-lm")
        recipe.parallelism.check_ranks(ranks, path)
        setting = cls(recipe, config, ranks, min(per_node, ranks), board)
        return setting.sessions[-1][0] if recipe.stream is not None else setting

    @property
    def sessions(self) -> list[tuple[Setting, int]]:
        """With the model of each size that the run trains, from the first on, and its optimiser steps: with `anytime` a
        model may grow between sessions, else it has one size."""
        stream, base = self.recipe.stream, resolve(self.recipe.model)
        if stream is None or not isinstance(base, GrowingConfig):
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
        readers = self.ranks // self.recipe.parallelism.tensor
        return Share(self.recipe.sequences_per_step, readers, self.recipe.batch.micro)

    @property
    def shards(self) -> int:
        return self.recipe.parallelism.shard_ranks(self.ranks, self.per_node)

    @property
    def spread(self) -> Spread:
        parallelism = self.recipe.parallelism
        return Spread(
            shards=self.shards,
            experts=parallelism.expert,
            tensor=parallelism.tensor,
            reshards=parallelism.reshards_after_forward,
            prefetch=parallelism.prefetch.backward,
            micro_batches=self.share.micro_batches,
            accumulates_locally=parallelism.accumulates_locally,
            activation_checkpointing=self.recipe.activation_checkpointing,
        )

    @property
    def micro_batch(self) -> Pass:
        length, low = self.recipe.data.sequence_length, compute_bytes(self.recipe.precision)
        on_gpu = self.board is not None
        tokens = self.share.micro_sequences * length
        return Pass(
            tokens, length, low, mask_bytes=1 if on_gpu else low, fused_dropout=on_gpu,
            tensor=self.recipe.parallelism.tensor,
        )  # fmt: skip

    @property
    def places(self) -> int | None:
        """Of a micro-batch's tokens those with logits; None: all."""
        if self.recipe.objective != "masked-lm":
            return None
        return self.share.micro_sequences * self.recipe.masks.places(self.recipe.data.sequence_length)

    def memory(self) -> Moment:
        """Of the fullest rank, at the fullest moment."""
        return peak(self.config, self.spread, self.micro_batch, self.places)

    @property
    def room(self) -> float | None:
        """Bytes of a device that a run may use."""
        return None if self.board is None else USABLE * self.board.gibibytes * 2**30

    def fits(self) -> bool | None:
        return None if self.room is None else self.memory().total <= self.room
