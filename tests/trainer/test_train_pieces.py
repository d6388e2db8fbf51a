"""The parts of a step, each against plain torch in one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gang import make_recipe
from reference import fresh_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.objectives.causal_lm import IGNORED, CausalLM
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.mesh import build_mesh
from trireme_trainer.parallel.network import interface_of, local_address_towards
from trireme_trainer.parallel.shard import shard_model
from trireme_trainer.parallel.world import World, cpu_quota
from trireme_trainer.settings import Settings


@pytest.fixture
def world() -> Iterator[World]:
    joined = World.join(Settings(Recipe.model_validate(make_recipe(Path("/nowhere"))), None))
    yield joined
    joined.leave()


def spec(**changes: object) -> Recipe:
    return Recipe.model_validate(make_recipe(Path("/nowhere"), **changes))


def sharded(world: World, recipe: Recipe) -> LanguageModel:
    with torch.device("meta"):
        model = build(check_recipe(recipe))
    shard_model(model, recipe, build_mesh(recipe.parallelism, world), world.device, "aot_eager")
    initialise(model, recipe.seed)
    return model


def batch(rows: int = 3, vocabulary: int = 512) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, vocabulary, (rows, 33), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = IGNORED
    return tokens[:, :-1], targets


@pytest.mark.parametrize("overrides", [{}, {"embeddingWidth": 16, "preNorm": False}], ids=["tied", "projected"])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 1000])
def test_chunks_of_the_loss_add_up_to_the_whole(overrides: dict, tokens_per_chunk: int) -> None:
    recipe = make_recipe(Path("/nowhere"))
    recipe["model"]["overrides"].update(overrides)
    chunked, whole = fresh_model(recipe), fresh_model(recipe)
    tokens, targets = batch()
    valid = torch.tensor(float((targets != IGNORED).sum()) * 2)
    loss = CausalLM(512, chunk_bytes=4 * 512 * tokens_per_chunk)(chunked, tokens, targets, valid)
    loss.backward()
    logits = whole(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum") / valid
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-6
    for (_, one), (_, other) in zip(chunked.named_parameters(), whole.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_no_more_than_one_chunk_of_logits_exists() -> None:
    model = fresh_model(make_recipe(Path("/nowhere")))
    tokens, targets = batch()
    sizes = []
    plain = model.project

    def project(hidden: Tensor) -> Tensor:
        logits: Tensor = plain(hidden)
        sizes.append(logits.numel())
        return logits

    model.project = project  # type: ignore[method-assign]
    CausalLM(512, chunk_bytes=4 * 512 * 10)(model, tokens, targets, torch.tensor(96.0)).backward()
    assert sum(sizes) == 3 * 32 * 512, "each logit is computed once"
    assert max(sizes) == 10 * 512


def test_without_gradients_the_loss_is_the_same_and_leaves_none() -> None:
    model = fresh_model(make_recipe(Path("/nowhere")))
    tokens, targets = batch()
    objective = CausalLM(512, chunk_bytes=4 * 512 * 10)
    with torch.no_grad():
        loss = objective(model, tokens, targets, torch.tensor(50.0))
    assert not loss.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert abs(loss.item() - objective(model, tokens, targets, torch.tensor(50.0)).item()) < 1e-6


def flops_of_a_step(world: World, recipe: Recipe) -> int:
    model = sharded(world, recipe)
    tokens, targets = batch()
    # The counter does not know the fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        CausalLM(512)(model, tokens, targets, torch.tensor(96.0)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_step_executes_what_the_figures_count(world: World, pre_norm: bool) -> None:
    """Model FLOPs without recomputation, hardware FLOPs with it, and the loss's chunks computed once."""
    recipe = make_recipe(Path("/nowhere"))
    recipe["model"]["overrides"]["preNorm"] = pre_norm
    plain = Recipe.model_validate(recipe)
    config = check_recipe(plain)
    tokens = 3 * 32
    executed = flops_of_a_step(world, plain)
    assert executed == tokens * 3 * config.forward_flops_per_token(32, causal=False)
    recomputing = flops_of_a_step(world, Recipe.model_validate({**recipe, "activationCheckpointing": True}))
    assert recomputing - executed == tokens * config.recomputed_flops_per_token(32, causal=False)


def test_compile_compiles_every_block_as_one_graph(world: World) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = sharded(world, spec(compile=True))
    tokens, targets = batch()
    CausalLM(512)(model, tokens, targets, torch.tensor(96.0)).backward()
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(getattr(block, "_compiled_call_impl", None) is not None for block in model.blocks)


def test_names_survive_recompute_compile_and_sharding(world: World) -> None:
    bare = [name for name, _ in fresh_model(make_recipe(Path("/nowhere"))).named_parameters()]
    model = sharded(world, spec(compile=True, activationCheckpointing=True))
    assert [name for name, _ in model.named_parameters()] == bare


def test_initial_values_are_those_of_the_bare_model(world: World) -> None:
    bare = dict(fresh_model(make_recipe(Path("/nowhere"))).named_parameters())
    for name, parameter in sharded(world, spec()).named_parameters():
        assert torch.equal(parameter.full_tensor(), bare[name]), name  # type: ignore[attr-defined]


def test_a_skipped_step_leaves_weights_moments_and_count(world: World) -> None:
    recipe = spec()
    model = sharded(world, recipe)
    optimizer = Optimizer(model, recipe.optimizer)

    def step(skip: float, poison: bool) -> None:
        tokens, targets = batch()
        CausalLM(512)(model, tokens, targets, torch.tensor(96.0)).backward()
        if poison:
            next(iter(model.parameters())).grad.to_local()[0] = float("nan")  # type: ignore[union-attr]
        norm = optimizer.clip()
        assert bool(torch.isfinite(norm)) != poison
        optimizer.step(1e-3, torch.tensor(skip))

    step(0.0, poison=False)
    before = snapshot(model, optimizer)
    step(1.0, poison=True)
    assert all(torch.equal(before[name], value) for name, value in snapshot(model, optimizer).items())
    step(0.0, poison=False)
    after = snapshot(model, optimizer)
    assert float(after["step"]) == 2
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert not torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()
    tensors = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    tensors.update({f"m.{name}": m.full_tensor() for name, m in state["exp_avg"].items()})
    tensors.update({f"v.{name}": v.full_tensor() for name, v in state["exp_avg_sq"].items()})
    return {name: tensor.detach().clone() for name, tensor in {**tensors, "step": state["step"]}.items()}


@pytest.mark.parametrize(
    ("parallelism", "world_size", "local", "group"),
    [
        ({"shard": "full"}, 6, 2, 6),
        ({"shard": "grad-op"}, 6, 2, 6),
        ({"shard": "hybrid"}, 8, 4, 4),
        ({"shard": "hybrid", "shardSize": 2}, 8, 4, 2),
        ({"shard": "hybrid", "shardSize": 2}, 3, 1, 3),
        ({"shard": "hybrid", "shardSize": 4}, 6, 1, 6),
        ({"shard": "hybrid", "shardSize": 16}, 6, 1, 6),
    ],
)
def test_a_shard_group_is_never_smaller_than_asked(parallelism: dict, world_size: int, local: int, group: int) -> None:
    assert spec(parallelism=parallelism).parallelism.shard_ranks(world_size, local) == group


def test_the_interface_of_an_address() -> None:
    assert local_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None
    assert local_address_towards("no-such-host.invalid") is None


def test_the_cpu_limit_of_a_container(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text("150000 100000\n")
    assert cpu_quota(str(limit)) == 1.5
    limit.write_text("max 100000\n")
    assert cpu_quota(str(limit)) == float("inf")
    assert cpu_quota(str(tmp_path / "none")) == float("inf")


def test_the_group_of_one_needs_no_port(world: World) -> None:
    assert dist.get_world_size() == 1
    assert world.sum([2.0, 3.0]).tolist() == [2.0, 3.0]


def test_freed_memory_is_used_again_without_new_pages() -> None:
    """In a process of its own: the setting is the whole process's."""
    code = (
        "import resource, sys, torch\n"
        "from trireme_trainer.parallel.world import keep_freed_memory\n"
        "assert sys.argv[1] == 'no' or keep_freed_memory()\n"
        "def fill():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(1 << 24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        # Small blocks may settle in a freed hole once or twice, and the heap grows past it: the median tells.
        "print(sorted(fill() for _ in range(31))[15])\n"
    )
    faults = {
        keep: int(subprocess.check_output([sys.executable, "-c", code, keep], text=True)) for keep in ("no", "yes")
    }
    assert faults["yes"] * 10 < faults["no"]
