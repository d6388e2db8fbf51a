"""A language model's checkpoint grown between two sessions: same function, more capacity, optimiser state carried along
(after 2106.09563; its language models were never released, so this is a reconstruction).

In this process alone, whole: memory for the model before and after with both moments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trireme_api.families import ModelConfig, specify
from trireme_api.families.growing import GrowingConfig
from trireme_api.recipe import DataSource

from trireme_trainer.checkpoint import Checkpointer, CheckpointError, CheckpointStore
from trireme_trainer.checkpoint.exchange import OWNER, describe
from trireme_trainer.checkpoint.loader import load_newest
from trireme_trainer.checkpoint.ranks import Ranks
from trireme_trainer.checkpoint.state import flatten
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.layers.init import full_value
from trireme_trainer.layers.soft_experts import SoftExperts

TOLERANCE = 1e-4
"""Largest difference of a logit before and after that counts as rounding, relative to the largest logit."""
UNITS = {"fp32": TOLERANCE, "bf16": 5e-2, "fp16": 1e-2}
"""The same by the precision that is computed in."""
_EXPERT = re.compile(r"(blocks\.(\d+)\.feed_forward\.experts\.)(\d+)(\..+)")
_MEMBER = re.compile(r"members\.(\d+)\.(.+)")

Weights = dict[str, Tensor]
Parent = Callable[[str], str | None]
"""Of a parameter that only the grown model has: the one of the smaller model that it begins as a copy of; None: of
none."""


class GrowthError(ValueError):
    """The checkpoint or the data cannot serve; the message says what would."""


@dataclass(frozen=True)
class Grown:
    config: GrowingConfig
    step: int
    split: tuple[int, ...]
    """By layer: the expert that was split."""
    usage: tuple[tuple[float, ...], ...]
    """By layer and expert: mean share before the split."""
    difference: float
    """Largest change of a logit, relative to the largest logit."""
    path: str


def grow_checkpoint(
    source: str, target: str, data: str, *, step: int | None = None, blocks: int = 32, length: int = 0, seed: int = 1
) -> Grown:
    """Splits the most used expert of every layer of the newest good checkpoint under `source` (or the one of `step`)
    into two and commits the result, of the same step, under `target`. Takes no fence at `source`.

    Usage is measured on `blocks` held-out blocks of `length` tokens (0: all positions of the model) of the shards in
    `data`, as the released code measures it on the validation rows of the new mega-batch. Copies take over both
    moments, a new gate has none; it is drawn from (seed, its name).

    Raises GrowthError, CheckpointError, DataError.
    """
    held_in, written_to = CheckpointStore(source), CheckpointStore(target)
    if written_to.exists() and written_to.candidates():
        raise CheckpointError(f"{target}: holds checkpoints already; name an empty or new directory")
    config = describe(held_in, step)
    if not isinstance(config, GrowingConfig):
        inside = "grows inside a run (recipe.anytime)" if config.grows else "cannot grow"
        raise GrowthError(f"{source}: {config.family} {inside}; train a preset of the family growing")
    model = _model(config)
    weights = dict(model.named_parameters())
    moments = {kind: {name: torch.empty_like(w) for name, w in weights.items()} for kind in ("exp_avg", "exp_avg_sq")}
    count = torch.zeros((), dtype=torch.float32)
    state = {"model": dict(weights), "optimizer": {**moments, "step": count}}
    with torch.no_grad():
        loaded = load_newest(held_in, Ranks(), flatten(state), strict=False, at_most=step)
    if loaded is None or (step is not None and loaded.step != step):
        raise CheckpointError(f"{source}: the checkpoint of step {step} is not usable")
    tokens_BT = held_out(data, length or config.maximum_positions, blocks)
    if int(tokens_BT.max()) >= config.vocabulary_size:
        raise GrowthError(f"{data}: has token {int(tokens_BT.max())}, the model {config.vocabulary_size} entries")
    used = usage(model, tokens_BT)
    chosen = most_used(used)
    after = config.split(chosen)
    bigger = _model(after)
    made = {name: w.detach() for name, w in weights.items()}
    grown_weights = divide(made, chosen, bigger, seed)
    bigger.load_state_dict(grown_weights, strict=False)
    difference = _difference(model, bigger, tokens_BT)
    if difference > TOLERANCE:
        raise GrowthError(f"{source}: growth would change a logit by {difference:.1e} of the largest; not written")
    optimizer: dict[str, Any] = {kind: divide(values, chosen, bigger, None) for kind, values in moments.items()}
    path = _commit(written_to, loaded.step, {"model": grown_weights, "optimizer": {**optimizer, "step": count}}, {
        **{name: value for name, value in loaded.meta.items() if name != "data"},
        "grown": {"from": loaded.path, "split": list(chosen)},
        "model": {"family": after.family, "preset": specify(after).preset, **after.model_dump()},
    })  # fmt: skip
    shares = tuple(tuple(round(share, 6) for share in layer) for layer in used)
    return Grown(after, loaded.step, chosen, shares, difference, path)


def divide(values: Mapping[str, Tensor], chosen: tuple[int, ...], bigger: LanguageModel, seed: int | None) -> Weights:
    """`values` by parameter name of the smaller model → of `bigger`: a new expert has those of the expert `chosen` in
    its layer; a new gate its initial value, or zeros without a seed."""
    out: Weights = {}
    parent = expert_of_split(chosen)
    for name, parameter in bigger.named_parameters():
        found = origin(values, name, parent)
        if found is not None:
            out[name] = found.clone()
        elif seed is None:
            out[name] = torch.zeros_like(parameter)
        else:
            out[name] = full_value(name, tuple(parameter.shape), bigger.initial_value(name), seed)
    return out


def expert_of_split(chosen: tuple[int, ...]) -> Parent:
    """A new expert is a copy of the expert `chosen` in its layer, a new gate of nothing."""

    def parent(name: str) -> str | None:
        match = _EXPERT.fullmatch(name)
        if match is None:
            return None
        head, layer, _, tail = match.groups()
        return f"{head}{chosen[int(layer)]}{tail}"

    return parent


def member_before(name: str) -> str | None:
    """A new member is a copy of the one that was the newest."""
    match = _MEMBER.fullmatch(name)
    return f"members.{int(match[1]) - 1}.{match[2]}" if match else None


def origin(values: Mapping[str, Tensor], name: str, parent: Parent) -> Tensor | None:
    """Of the smaller model's `values`, the one that the parameter `name` of the grown model begins with: its own, or
    that of its parent; None for what has none."""
    known: str | None = name if name in values else parent(name)
    return None if known is None else values[known]


@torch.no_grad()
def carry_over(values: Mapping[str, Tensor], parent: Parent, into: Mapping[str, Tensor]) -> None:
    """Values of the smaller model into those of the grown one, in place and without communication: copies are sharded
    as what they are copies of, so each rank copies its own part. What has no parent is left as it is."""
    for name, target in into.items():
        found = origin(values, name, parent)
        if found is not None:
            _local(target).copy_(_local(found))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def usage(model: LanguageModel, tokens_BT: Tensor) -> list[list[float]]:
    """By layer and expert: its mean share over all tokens; 1 in all."""
    with torch.no_grad(), watch_usage(model) as found:
        model(tokens_BT)
    return found


@contextmanager
def watch_usage(model: LanguageModel) -> Iterator[list[list[float]]]:
    """By layer and expert: its mean share over the tokens of the forward pass made inside; 1 in all."""
    layers = [module for module in model.modules() if isinstance(module, SoftExperts)]
    found: list[list[float]] = [[] for _ in layers]

    def note(number: int, layer: SoftExperts, x_BTD: Tensor) -> None:
        found[number] = [float(share.mean()) for share in layer.shares(x_BTD)]

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, number=number: note(number, module, args[0]))
        for number, layer in enumerate(layers)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def most_used(shares: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """By layer: the expert with the greatest share; the first of equals."""
    return tuple(layer.index(max(layer)) for layer in shares)


def held_out(data: str, length: int, blocks: int) -> Tensor:
    """[blocks at most, length] token numbers, evenly from the held-out split. Raises DataError where that has none."""
    try:
        kept = Mixture([DataSource(path=data)], length, seed=1).valid_blocks()
    except DataError as error:
        raise DataError(str(error).replace("data.sources[0].path", "--data", 1)) from None
    if not len(kept):
        raise DataError(f"{data}: no held-out block of {length + 1} tokens; prepare more text, or give --length")
    taken = min(blocks, len(kept))
    rows = [kept[i * len(kept) // taken][:-1] for i in range(taken)]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def _difference(before: LanguageModel, after: LanguageModel, tokens_BT: Tensor) -> float:
    first = before(tokens_BT[:4])
    return float((after(tokens_BT[:4]) - first).abs().max() / first.abs().max())


def _model(config: ModelConfig) -> LanguageModel:
    return build(config).requires_grad_(False).eval()


def _commit(store: CheckpointStore, step: int, state: dict[str, Any], meta: dict[str, Any]) -> str:
    checkpointer = Checkpointer(store, attempt=0, owner=OWNER)
    checkpointer.save(step, state, meta)
    checkpointer.wait()
    committed = checkpointer.poll()
    checkpointer.close()
    return committed[0].path
