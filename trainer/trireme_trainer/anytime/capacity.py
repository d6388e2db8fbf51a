"""How a model in a run becomes larger before a session (`anytime.growEvery`): by one expert more in every layer, or by
one member more. Which parameter of the smaller model each of the larger begins as is all there is to know: weights and
moments are copied shard by shard, on the rank that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trireme_api.families import ModelConfig
from trireme_api.families.ensemble import EnsembleConfig
from trireme_api.families.growing import GrowingConfig

from trireme_trainer.anytime.language import Parent, expert_of_split, member_before, most_used, watch_usage
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.mode import evaluating
from trireme_trainer.parallel.world import World


@dataclass(frozen=True)
class Growth:
    config: ModelConfig
    """Of the larger model."""
    parent: Parent
    size: str
    """For a person."""
    told: dict[str, Any]
    """For the step log."""


def larger(model: LanguageModel, held_out: Callable[[], list[Tensor]], world: World) -> Growth:
    """The growth that is due for `model`. `held_out`: blocks [1, length] that usage is measured on. Collective."""
    config = model.config
    if isinstance(config, EnsembleConfig):
        more = config.grown(1)
        return Growth(more, member_before, f"{more.members} members", {"members": more.members})
    assert isinstance(config, GrowingConfig)
    used = measure(model, held_out(), world)
    chosen = most_used(used)
    split = config.split(chosen)
    shares = [[round(share, 6) for share in layer] for layer in used]
    told = {"split": list(chosen), "usage": shares, "splits": split.splits}
    return Growth(split, expert_of_split(chosen), f"{split.growths + 1} experts a layer", told)


def as_grown(base: ModelConfig, saved: Mapping[str, Any]) -> ModelConfig:
    """`base` as large as the model that a checkpoint's `meta.model` describes; whether the rest is the same is checked
    when it is loaded."""
    if not base.grows or saved.get("family") != base.family or saved.get("layers") != base.layers:
        return base
    return type(base).model_validate({**base.model_dump(), base.grown_by: saved[base.grown_by]})


@torch.no_grad()
def measure(model: LanguageModel, blocks: list[Tensor], world: World) -> list[list[float]]:
    """By layer and expert: its mean share over all `blocks`, dealt to the ranks. Collective.

    A block is taken through the model by itself, so that its shares do not depend on the number of ranks."""
    mine: list[list[float]] = []
    turns = -(-len(blocks) // world.data_size)
    with evaluating(model):
        for turn in range(turns):
            number = turn * world.data_size + world.data_rank
            # Every rank makes every turn, for each gathers the others' shards; what is too many counts nothing.
            block = blocks[min(number, len(blocks) - 1)].to(world.device)
            with watch_usage(model) as found:
                model(block)
            weight = 1.0 / len(blocks) if number < len(blocks) else 0.0
            mine = _added(mine, found, weight)
    flat = world.sum([share for layer in mine for share in layer]).tolist()
    return [[flat.pop(0) for _ in layer] for layer in mine]


def _added(sums: list[list[float]], found: list[list[float]], weight: float) -> list[list[float]]:
    if not sums:
        return [[weight * share for share in layer] for layer in found]
    return [
        [total + weight * share for total, share in zip(totals, layer, strict=True)]
        for totals, layer in zip(sums, found, strict=True)
    ]


@torch.no_grad()
def difference(before: LanguageModel, after: LanguageModel, tokens_BT: Tensor) -> float:
    """Largest change of a logit of what is trained, relative to the largest logit. Collective. An ensemble's answer may
    change: its newest member counts twice until it has learnt."""
    first, second = (_logits(model.trained()[-1], tokens_BT) for model in (before, after))
    changed = (second - first).abs().max() / first.abs().max()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(changed, dist.ReduceOp.MAX)
    return float(changed)


def _logits(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    with evaluating(model):
        logits: Tensor = model(tokens_BT).float()
    return logits
