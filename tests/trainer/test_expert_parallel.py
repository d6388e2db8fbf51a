"""Experts shared out among ranks: the same layer, the same initial values, the same dropping as on one rank."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gang import _server, make_recipe
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from trireme_api.families import check_recipe
from trireme_api.job import parse_spec
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec
from trireme_api.validation import check_spec
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.layers.experts import Experts, MixtureOfExperts
from trireme_trainer.layers.init import full_value
from trireme_trainer.parallel.experts import AllToAll
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.mesh import build_expert_mesh, build_mesh
from trireme_trainer.parallel.shard import shard_model
from trireme_trainer.parallel.world import World

WIDTH, EXPERTS = 8, 4
CPU = torch.device("cpu")


def _recipe(expert: int = 2, **changes: Any) -> dict[str, Any]:
    overrides = {"maximumPositions": 32, "width": 16, "feedForwardWidth": 16, **changes.pop("overrides", {})}
    recipe = make_recipe(Path("/nowhere"), model={"preset": "moe-tiny", "overrides": overrides}, **changes)
    return {**recipe, "parallelism": {"expert": expert, **changes.get("parallelism", {})}}


def _run(target: Callable[..., None], ranks: int, *arguments: str) -> None:
    processes = [_server.Process(target=target, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


# --- one layer on two ranks ---


def _mixture(capacity: str) -> MixtureOfExperts:
    mixture = MixtureOfExperts(
        WIDTH, 12, EXPERTS, "gelu", capacity=capacity, capacity_factor=0.8, evaluation_capacity=1.0,  # type: ignore[arg-type]
        balance_weight=0.1, gradient_scale=2.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for weight in mixture.parameters():
        nn.init.normal_(weight, std=0.5, generator=generator)
    return mixture


def _hidden(rank: int, tokens: int = 11) -> Tensor:
    """Rank 1's tokens are all alike, so that two experts get none of them."""
    hidden = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(rank))
    return hidden if rank == 0 else hidden[:, :1].repeat(1, tokens, 1)


def _ways(mixture: MixtureOfExperts, rank: int) -> dict[str, Tensor]:
    hidden = _hidden(rank).requires_grad_()
    out = mixture.train()(hidden)
    out.square().sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        evaluated = mixture.eval()(_hidden(rank, tokens=5 + 4 * rank))
    return {"out": out.detach(), "hidden": hidden.grad, "evaluated": evaluated}


def _one_of_two(rank: int, result: str, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
    told: dict[str, Any] = {}
    for capacity in ("limited", "dropless"):
        mixture = _mixture(capacity)
        own = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
        for name, weight in list(mixture.experts.named_parameters()):
            mixture.experts.register_parameter(name, nn.Parameter(weight.detach()[own].clone()))
        mixture.experts.exchange = AllToAll(dist.group.WORLD)  # type: ignore[arg-type]
        told[capacity] = _ways(mixture, rank) | {name: weight.grad for name, weight in mixture.named_parameters()}
    torch.save(told, f"{result}-{rank}")
    dist.destroy_process_group()


def test_two_ranks_with_half_the_experts_are_one_rank_with_all(tmp_path: Path) -> None:
    """Outputs, gradients of tokens, gate and experts, and evaluation with more tokens on one rank than on the other."""
    _run(_one_of_two, 2, str(tmp_path / "told"), str(tmp_path / "meet"))
    both = [torch.load(tmp_path / f"told-{rank}", weights_only=True) for rank in (0, 1)]
    for capacity in ("limited", "dropless"):
        alone = _mixture(capacity)
        for rank in (0, 1):
            for name, wanted in _ways(alone, rank).items():
                torch.testing.assert_close(both[rank][capacity][name], wanted, rtol=1e-5, atol=1e-5, msg=name)
        for name, weight in alone.named_parameters():
            parts = [told[capacity][name] for told in both]
            found = torch.cat(parts) if name.startswith("experts.") else parts[0] + parts[1]
            torch.testing.assert_close(found, weight.grad, rtol=1e-5, atol=1e-4, msg=name)


# --- the whole model: what lies where ---


def _played(rank: int, world: int, recipe: Recipe) -> LanguageModel:
    """The model as `rank` has it, in a group that moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    here = World(rank, world, 0, world, CPU)
    with torch.device("meta"):
        model = build(check_recipe(recipe))
    expert_mesh = build_expert_mesh(recipe.parallelism, here)
    shard_model(model, recipe, build_mesh(recipe.parallelism, here), CPU, "eager", expert_mesh)
    initialise(model, recipe.seed)
    return model


LAYOUTS: dict[str, tuple[int, Recipe]] = {
    name: (world, Recipe.model_validate(_recipe(expert, parallelism=more, overrides={"experts": experts})))
    for name, world, expert, experts, more in (
        ("experts divide", 4, 2, 4, {}), ("rows divide", 4, 2, 2, {}), ("nothing divides", 6, 2, 4, {}),
        ("one each", 4, 4, 4, {}), ("hybrid", 6, 2, 4, {"shard": "hybrid", "shardSize": 1}),
    )
}  # fmt: skip


def _held(rank: int, result: str) -> None:
    """What `rank` has of each weight, in each layout. In a process of its own: torch remembers a mesh's coordinates."""
    torch.set_num_threads(1)
    told = {}
    for name, (world, recipe) in LAYOUTS.items():
        if rank < world:
            model = _played(rank, world, recipe)
            told[name] = {n: w.to_local().detach() for n, w in model.named_parameters() if isinstance(w, DTensor)}
            dist.destroy_process_group()
    torch.save(told, f"{result}-{rank}")


def test_every_weight_lies_once_on_the_ranks_with_the_values_of_its_name(tmp_path: Path) -> None:
    _run(_held, 6, str(tmp_path / "held"))
    ranks = [torch.load(tmp_path / f"held-{rank}", weights_only=True) for rank in range(6)]
    for layout, (world, recipe) in LAYOUTS.items():
        with torch.device("meta"):
            bare = build(check_recipe(recipe))
        held = [told[layout] for told in ranks[:world]]
        copies = 3 if layout == "hybrid" else 1
        for name, weight in bare.named_parameters():
            whole = full_value(name, tuple(weight.shape), bare.initial_value(name), recipe.seed)
            found = torch.cat([mine[name].flatten() for mine in held]).sort().values
            torch.testing.assert_close(found, whole.flatten().repeat(copies).sort().values, rtol=0, atol=0, msg=name)
            if ".experts." in name and layout != "nothing divides":
                assert {mine[name].numel() for mine in held} == {copies * whole.numel() // world}


def test_a_rank_gathers_its_own_experts_and_no_others() -> None:
    model = _played(1, 4, Recipe.model_validate(_recipe(2)))
    (experts,) = (part for part in model.modules() if isinstance(part, Experts))
    assert isinstance(experts.exchange, AllToAll)
    own, used = experts.exchange.own, []

    def watched(weight: Tensor) -> Tensor:
        used.append(len(own(weight)))
        return own(weight)

    experts.exchange.own = watched  # type: ignore[method-assign]
    model(torch.full((1, 4), 5)).sum().backward()
    dist.destroy_process_group()
    assert used == [EXPERTS // 2] * 4


def test_the_ranks_of_an_expert_group_follow_each_other() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    spec = Recipe.model_validate(_recipe(2, parallelism={"shard": "hybrid", "shardSize": 4})).parallelism
    mesh = build_expert_mesh(spec, World(5, 8, 0, 8, CPU))
    assert mesh is not None
    assert mesh.mesh_dim_names == ("replicate", "shard", "expert")
    assert [mesh[name].mesh.tolist() for name in mesh.mesh_dim_names] == [[1, 5], [5, 7], [4, 5]]
    assert build_expert_mesh(spec.model_copy(update={"expert": 1}), World(5, 8, 0, 8, CPU)) is None
    dist.destroy_process_group()


# --- what is refused ---


def test_a_number_of_ranks_that_cannot_be_arranged_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidSpec, match=r"^parallelism.expert: must divide the 4 experts of moe-tiny, got 3; set"):
        check_recipe(Recipe.model_validate(_recipe(3)))
    dense = _recipe(2) | {"model": {"preset": "opt-tiny", "overrides": {"maximumPositions": 32}}}
    with pytest.raises(InvalidSpec, match=r"^parallelism.expert: must be 1 for opt-tiny, which has no experts; .*moe-"):
        check_recipe(Recipe.model_validate(dense))
    four = Recipe.model_validate(_recipe(4)).parallelism
    four.check_ranks(8)
    with pytest.raises(InvalidSpec, match=r"^parallelism.expert: 4 does not divide 6 ranks; .* or set 2$"):
        four.check_ranks(6)


def test_a_gang_that_may_shrink_to_a_size_that_does_not_divide_is_refused() -> None:
    def told(replicas: dict[str, Any], procs: int) -> list[str]:
        spec = {
            "recipe": _recipe(4) | {"data": {"sources": [{"path": "pvc://c/d"}], "sequenceLength": 32}},
            "checkpoint": {"uri": "pvc://c/k"}, "procsPerNode": procs, "replicas": replicas,
            "template": {"image": "trireme"},
        }  # fmt: skip
        return [str(problem) for problem in check_spec(parse_spec(spec))]

    (line,) = told({"desired": 4, "min": 2}, 2)
    assert line.startswith("spec.recipe.parallelism.expert: 4 does not divide 6 ranks, the gang of 3 nodes")
    assert line.endswith("set spec.replicas.allowed to multiples of 2")
    assert told({"desired": 4, "allowed": [2, 4]}, 2) == []
    assert told({"desired": 3, "min": 1}, 4) == []
