"""What the FSDP paper (2304.11277) promises of order and memory, measured in one process that plays one of four ranks.

Collectives of the group "fake" return at once and move nothing: order and sizes are real, values are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gang import make_recipe
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.parallel.collectives import CollectiveLog
from trireme_trainer.parallel.initialise import initialise, local_bytes
from trireme_trainer.parallel.live_memory import LiveMemory
from trireme_trainer.parallel.shard import Accumulation, shard_model

RANKS = 4
CPU = torch.device("cpu")
SMALL = 1000
"""Bytes of step counts and other single numbers."""


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield
    dist.destroy_process_group()


def make(layers: int = 4, precision: str = "fp32", **parallelism: Any) -> tuple[LanguageModel, Recipe]:
    raw = make_recipe(Path("/nowhere"), precision=precision, parallelism=parallelism)
    raw["model"]["overrides"]["layers"] = layers
    recipe = Recipe.model_validate(raw)
    with torch.device("meta"):
        model = build(check_recipe(recipe))
    size = recipe.parallelism.shard_size
    mesh = (
        init_device_mesh("cpu", (RANKS // size, size), mesh_dim_names=("replicate", "shard"))
        if size
        else init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    )
    shard_model(model, recipe, mesh, CPU, "eager")
    initialise(model, recipe.seed)
    return model, recipe


class Watched:
    """The log of a model's collectives, with the computation of its blocks between them, and how many are gathered."""

    def __init__(self, model: LanguageModel, *, replicated: bool = False) -> None:
        self.model = model
        self.log = CollectiveLog(model, replicated=replicated)
        self.events: list[str] = []
        self.most_gathered = 0
        self._asked: set[str] = set()
        self._there: set[str] = set()
        add = self.log.add

        def note(operation: Any, unit: str, buffer: torch.Tensor) -> None:
            add(operation, unit, buffer)
            self._note(f"{operation} {unit}")

        self.log.add = note  # type: ignore[method-assign]
        for index, block in enumerate(model.blocks):
            norm = block.attention_norm
            norm.register_forward_hook(lambda *_, name=f"blocks.{index}": self._note(f"forward {name}"))
            norm.register_full_backward_hook(lambda *_, name=f"blocks.{index}": self._note(f"backward {name}"))

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event.startswith("all-gather blocks"):
            self._asked.add(event.split()[1])
        gathered = {f"blocks.{i}" for i, b in enumerate(self.model.blocks) if is_whole(b)}
        self._there = (self._there | (self._asked & gathered)) & gathered
        self._asked -= self._there
        self.most_gathered = max(self.most_gathered, len(self._there | self._asked))

    def step(self, recipe: Recipe | None = None, micro_batches: int = 1) -> list[str]:
        """Events of one optimiser step."""
        self.events.clear()
        self.log.clear()
        for number in range(micro_batches):
            if recipe:
                Accumulation(self.model, recipe).before(number, micro_batches)
            self.model(torch.full((1, 4), 5)).sum().backward()
        return self.events

    def collectives(self, operation: str) -> list[str]:
        return [entry.unit for entry in self.log.entries if entry.operation == operation]


def is_whole(block: nn.Module) -> bool:
    return not isinstance(next(block.parameters()), DTensor)


BLOCKS = [f"blocks.{index}" for index in range(4)]


def test_a_step_gathers_every_block_twice_and_the_root_once() -> None:
    watched = Watched(make()[0])
    for _ in range(2):
        watched.step()
        assert watched.collectives("all-gather") == ["root", *BLOCKS, *reversed(BLOCKS)]
        assert watched.collectives("reduce-scatter") == [*reversed(BLOCKS), "root"]


@pytest.mark.parametrize("how", [{"reshardAfterForward": False}, {"shard": "grad-op"}], ids=["named", "grad-op"])
def test_parameters_that_stay_after_the_forward_pass_are_gathered_once(how: dict[str, Any]) -> None:
    watched = Watched(make(**how)[0])
    watched.step()
    assert watched.collectives("all-gather") == ["root", *BLOCKS]
    assert watched.most_gathered == 4


def test_backward_prefetch_gathers_the_next_block_before_reducing_this_one() -> None:
    events = Watched(make()[0]).step()
    assert backward_gaps(events) == [True, True, True]


def test_without_backward_prefetch_each_block_waits_for_its_turn() -> None:
    watched = Watched(make(prefetch={"backward": 0})[0])
    assert backward_gaps(watched.step()) == [False, False, False]
    assert watched.most_gathered == 1


def backward_gaps(events: list[str]) -> list[bool]:
    """For each block but the last of the backward pass: was the next one asked for before it was reduced?"""
    turn = len(events) - 1 - events[::-1].index("forward blocks.3")
    after = events[turn:]
    return [
        after.index(f"all-gather blocks.{index - 1}") < after.index(f"reduce-scatter blocks.{index}")
        for index in (3, 2, 1)
    ]


@pytest.mark.parametrize(("forward", "before"), [(0, 1), (1, 2), (2, 3)])
def test_forward_prefetch_asks_before_the_block_at_work_computes(forward: int, before: int) -> None:
    events = Watched(make(prefetch={"forward": forward})[0]).step()
    asked = [event for event in events[: events.index("forward blocks.0")] if event.startswith("all-gather blocks")]
    assert asked == [f"all-gather blocks.{index}" for index in range(before)]


@pytest.mark.parametrize(("prefetch", "most"), [({}, 2), ({"backward": 2}, 3), ({"forward": 1, "backward": 0}, 2)])
def test_no_more_blocks_are_gathered_than_prefetching_allows(prefetch: dict[str, int], most: int) -> None:
    watched = Watched(make(layers=6, prefetch=prefetch)[0])
    watched.step()
    watched.step()
    assert watched.most_gathered == most


def test_gradients_travel_after_each_micro_batch_or_after_the_last() -> None:
    each = [*reversed(BLOCKS), "root"]
    for how, sent in (({}, each * 3), ({"accumulation": "local"}, each), ({"shard": "grad-op"}, each)):
        model, recipe = make(**how)
        watched = Watched(model)
        watched.step(recipe, micro_batches=3)
        assert watched.collectives("reduce-scatter") == sent, how
        gathers = len(watched.collectives("all-gather"))
        if how == {"shard": "grad-op"}:
            assert gathers == 5, "parameters stay between micro-batches"
        watched.step(recipe, micro_batches=3)
        assert watched.collectives("reduce-scatter") == sent, "the second step is the first"


@pytest.mark.parametrize("how", ["auto", "communicate", "local"])
def test_hybrid_reduces_inside_a_group_and_then_between_groups(how: str) -> None:
    model, recipe = make(shard="hybrid", shardSize=2, accumulation=how)
    watched = Watched(model, replicated=True)
    watched.step(recipe, micro_batches=2)
    units = [*reversed(BLOCKS), "root"]
    pairs = [f"{operation} {unit}" for unit in units for operation in ("reduce-scatter", "all-reduce")]
    sent = [event for event in watched.events if event.startswith(("reduce", "all-reduce"))]
    inside = [f"reduce-scatter {unit}" for unit in units]
    assert sent == {"auto": inside + pairs, "communicate": pairs * 2, "local": pairs}[how]


def test_buffers_are_whole_units_padded_by_less_than_a_row_per_rank() -> None:
    """The paper pads one flat parameter per unit by at most F - 1 elements (§3.2.1); FSDP2 pads each parameter by at
    most F - 1 rows instead."""
    model, _ = make()
    shapes = [parameter.shape for parameter in model.blocks[0].parameters()]
    padded = sum(-(-shape[0] // RANKS) * RANKS * shape[1:].numel() for shape in shapes)
    watched = Watched(model)
    watched.step()
    sizes = {entry.elements for entry in watched.log.entries if entry.unit == "blocks.0"}
    assert sizes == {padded}


def test_mixed_precision_gathers_low_and_reduces_in_fp32() -> None:
    model, _ = make(precision="bf16")
    watched = Watched(model)
    watched.step()
    kinds = {(entry.operation, entry.dtype) for entry in watched.log.entries}
    assert kinds == {("all-gather", "bfloat16"), ("reduce-scatter", "float32")}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def peaks(layers: int, **parallelism: Any) -> dict[str, int]:
    """Most bytes alive beyond the shards, while initial values are made, in the forward and in the backward pass."""
    with LiveMemory(CPU) as live:
        model, _ = make(layers, **parallelism)
        shards = local_bytes(model.parameters())
        out = {"initialise": live.peak - shards}
        assert live.restart() - shards < 100
        logits = model(torch.full((1, 2), 5))
        out["forward"] = live.peak - shards
        live.restart()
        logits.sum().backward()
        out["backward"] = live.peak - shards
    return out


def test_state_is_sixteen_bytes_a_parameter_over_the_ranks() -> None:
    """Weights, gradients, both moments in fp32; gradients only between backward pass and step."""
    with LiveMemory(CPU) as live:
        model, recipe = make()
        optimizer = Optimizer(model, recipe.optimizer)
        shards = local_bytes(model.parameters())
        assert shards <= live.restart() - 2 * shards < shards + SMALL
        model(torch.full((1, 2), 5)).sum().backward()
        assert shards <= live.restart() - 3 * shards < shards + SMALL
        optimizer.step(1e-3, torch.zeros(()))
        assert shards <= live.now - 2 * shards < shards + SMALL
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert whole / RANKS <= shards < whole / RANKS + 10 * 4 * len(list(model.parameters()))


def test_memory_beside_the_shards_is_that_of_units_not_of_the_model() -> None:
    """§3.2.1: O(Σψ/F + max ψ). Doubling the layers adds their shards, and activations and gradient shards in the
    backward pass; where parameters stay, it adds the layers themselves."""
    shallow, deep = peaks(4), peaks(8)
    model, _ = make()
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 4
    outside = sum(p.numel() for p in model.parameters()) * 4 - 4 * block
    activations = 50_000
    assert shallow["initialise"] <= block
    assert deep["initialise"] == shallow["initialise"]
    # The root, a block and its neighbour, and the buffer that one of them was gathered into.
    assert deep["forward"] <= outside + 3 * block + activations
    assert deep["forward"] - shallow["forward"] <= activations
    assert deep["backward"] - shallow["backward"] <= 4 * block / RANKS + activations
    kept = peaks(8, reshardAfterForward=False)
    assert kept["forward"] >= 8 * block + outside
