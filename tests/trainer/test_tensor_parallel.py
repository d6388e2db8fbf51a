"""Layers divided among ranks: the same training as one process, each rank with its part of the weights."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gang import SEQUENCE, SEQUENCES, Gang, _server, make_recipe
from reference import saved_weights
from test_few_shot import make as few_shot_recipe
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from trireme_api.families import check_recipe
from trireme_api.job import parse_spec
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec
from trireme_api.validation import check_spec
from trireme_trainer.evaluation.scoring import Request, score
from trireme_trainer.families import build
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.causal_lm import IGNORED, CausalLM
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.parallel import tensor as division
from trireme_trainer.parallel.initialise import initialise, local_bytes
from trireme_trainer.parallel.mesh import build_mesh, build_tensor_mesh
from trireme_trainer.parallel.shard import shard_model
from trireme_trainer.parallel.world import World

CPU = torch.device("cpu")
SMALL = {"dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": 32, "width": 32, "heads": 4}
STEPS = 4
MODELS: dict[str, dict[str, Any]] = {
    "opt": {"preset": "opt-tiny"},
    "opt post-LN": {"preset": "opt-tiny", "preNorm": False},
    "gpt": {"preset": "gpt-tiny"},
    "xglm": {"preset": "xglm-tiny"},
    "xlmr": {"preset": "xlmr-tiny"},
    "normformer": {"preset": "normformer-tiny"},
    "normformer code": {"preset": "normformer-tiny", "headScale": "code"},
    "normformer-masked": {"preset": "normformer-masked-tiny"},
    "moe": {"preset": "moe-tiny", "capacityFactor": 1.0},
    "moe dropless": {"preset": "moe-tiny", "capacity": "dropless"},
}
REFUSED = {"gmlp": "gmlp-tiny", "smlp": "smlp-tiny", "growing": "growing-tiny", "ensemble": "ensemble-tiny"}


def _recipe(corpus: Path, model: str = "opt", tensor: int = 2, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    if model in REFUSED:
        overrides: dict[str, Any] = {"preset": REFUSED[model]}
    else:
        overrides = {**SMALL, **MODELS[model], **changes.pop("overrides", {})}
    spec = {"preset": overrides.pop("preset"), "overrides": overrides}
    parallelism = {"tensor": tensor, "logCollectives": True, **changes.pop("parallelism", {})}
    recipe = make_recipe(
        corpus, steps=steps, model=spec, parallelism=parallelism,
        schedule={"warmupTokens": 2 * SEQUENCES * SEQUENCE, "decayTokens": 20 * SEQUENCES * SEQUENCE}, **changes,
    )  # fmt: skip
    if model in ("xlmr", "normformer-masked"):
        recipe["objective"] = "masked-lm"
    return recipe


# --- every family, many ranks in one go: a few steps of AdamW on a few tokens, without the loop around them ---

ROWS = 2
"""Sequences of a step, each taken through the model by itself: what a mixture drops depends on what is together."""


def _train(world: World, model: str, **changes: Any) -> dict[str, Any]:
    recipe = Recipe.model_validate(_recipe(Path("/nowhere"), model, world.tensor, **changes))
    with torch.device("meta"):
        network = build(check_recipe(recipe))
    meshes = build_mesh(recipe.parallelism, world), build_tensor_mesh(recipe.parallelism, world)
    shard_model(network, recipe, meshes[0], CPU, "aot_eager", None, meshes[1])
    initialise(network, recipe.seed)
    optimizer, objective = Optimizer(network, recipe.optimizer), CausalLM(512)
    scale = torch.tensor(64.0) if recipe.precision == "fp16" else None
    told: dict[str, Any] = {"bytes": local_bytes(network.parameters()), "loss": [], "norm": []}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(0)  # the same in each step, so that there is something to learn
        tokens, targets = torch.randint(5, 384, (2, ROWS, SEQUENCE), generator=generator)
        if not network.config.causal:
            targets[torch.rand(ROWS, SEQUENCE, generator=generator) > 0.2] = IGNORED
        valid, total = (targets != IGNORED).sum(), torch.zeros(())
        for row in range(world.data_rank, ROWS, world.data_size):
            torch.manual_seed(step * ROWS + row)
            set_share(network, (targets[row] != IGNORED).sum() / valid)
            loss = objective(network, tokens[row : row + 1], targets[row : row + 1], valid, scale)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        told["norm"].append(float(optimizer.clip(scale)))
        optimizer.step(1e-2, torch.zeros(()))
        told["loss"].append(float(world.sum([total])))
    if network.config.causal and recipe.precision == "fp32":
        lines = torch.randint(5, 384, (5, 9), generator=torch.Generator().manual_seed(1)).numpy()
        scores = score(network, [Request(line, 4) for line in lines], world, sequences=1)
        told["scores"] = [one.log_likelihood for one in scores]
    return told


def _double_bias(self: Any, input: Tensor) -> Tensor:
    out: Tensor = self.peers.merge(torch.nn.functional.linear(input, self.weight.to_local()) + self.bias)
    return out


def _flawed_bias(world: World) -> dict[str, Any]:
    plain = division._Rows.forward
    division._Rows.forward = _double_bias  # type: ignore[method-assign]
    told = _train(world, "gpt")
    division._Rows.forward = plain  # type: ignore[method-assign]
    return told


def _flawed_data(world: World) -> dict[str, Any]:
    class Mistaken(World):
        data_rank = property(lambda self: self.rank)
        data_size = property(lambda self: self.size)

    return _train(Mistaken(world.rank, world.size, 0, world.size, CPU, world.tensor), "gpt")


def _draws(world: World) -> dict[str, Any]:
    mesh = build_tensor_mesh(Recipe.model_validate(_recipe(Path("/nowhere"))).parallelism, world)
    assert mesh is not None
    peers = division.Peers(mesh["tensor"])
    torch.manual_seed(3)
    with peers.own_draws(CPU):
        inside = torch.rand(8).tolist()
    return {"inside": inside, "after": torch.rand(8).tolist()}


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    **{name: lambda world, name=name: _train(world, name) for name in MODELS},  # type: ignore[misc]
    "recomputed": lambda world: _train(world, "normformer", activationCheckpointing=True),
    "compiled": lambda world: _train(world, "normformer", compile=True),
    "bf16": lambda world: _train(world, "opt", precision="bf16"),
    "fp16": lambda world: _train(world, "opt", precision="fp16"),
    "dropout": lambda world: _train(world, "gpt", overrides={"dropout": 0.1, "attentionDropout": 0.1}),
}
TWO: dict[str, Callable[[World], dict[str, Any]]] = {
    "flawed bias": _flawed_bias, "flawed data": _flawed_data, "draws": _draws,
}  # fmt: skip
FOUR: dict[str, Callable[[World], dict[str, Any]]] = {
    "hybrid": lambda world: _train(world, "opt", parallelism={"shard": "hybrid", "shardSize": 2}),
    "grad-op": lambda world: _train(world, "opt", parallelism={"shard": "grad-op"}),
    "all four": lambda world: _train(World(world.rank, world.size, 0, world.size, CPU, 4), "normformer"),
}


def _rank(rank: int, size: int, names: list[str], result: str, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, size), rank=rank, world_size=size)
    world = World(rank, size, 0, size, CPU, tensor=min(size, 2))
    torch.save({name: {**CASES, **TWO, **FOUR}[name](world) for name in names}, f"{result}-{size}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks and rank: what each case told."""
    root, found = tmp_path_factory.mktemp("told"), {}
    for size, cases in {1: [*CASES], 2: [*CASES, *TWO], 4: [*MODELS, *FOUR]}.items():
        arguments = (size, cases, str(root / "told"), str(root / f"meet-{size}"))
        processes = [_server.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        found[size] = [torch.load(root / f"told-{size}-{rank}", weights_only=True) for rank in range(size)]
    return found


def _apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative difference of a loss, a gradient norm or, where it is causal, an evaluated sequence."""
    kinds = [kind for kind in ("loss", "norm", "scores") if kind in wanted]
    return max(abs(a / b - 1) for kind in kinds for a, b in zip(found[kind], wanted[kind], strict=True))


Told = dict[int, list[dict[str, Any]]]


@pytest.mark.parametrize("model", MODELS)
def test_every_family_trains_as_on_one_rank(told: Told, model: str) -> None:
    """Two ranks, and four of which two divide the layers."""
    for size in (2, 4):
        for rank in range(size):
            assert _apart(told[size][rank][model], told[1][0][model]) <= 1e-5
    losses = told[1][0][model]["loss"]
    assert max(losses) - min(losses) > 0.05, "nothing was learned: this shows nothing"


@pytest.mark.parametrize("case", FOUR)
def test_with_any_sharding_around_it(told: Told, case: str) -> None:
    model = "normformer" if case == "all four" else "opt"
    for rank in range(4):
        assert _apart(told[4][rank][case], told[1][0][model]) <= 1e-5


@pytest.mark.parametrize("case", ["recomputed", "compiled"])
def test_recomputed_and_compiled_it_is_the_same(told: Told, case: str) -> None:
    assert _apart(told[2][1][case], told[1][0]["normformer"]) <= 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_it_differs_by_rounding(told: Told, precision: str) -> None:
    assert _apart(told[2][0][precision], told[1][0][precision]) <= 2e-2
    for kind in ("loss", "norm"):
        assert told[2][0][precision][kind] == told[2][1][precision][kind]


@pytest.mark.parametrize("flaw", ["flawed bias", "flawed data"])
def test_a_bias_added_twice_or_other_data_on_a_peer_is_seen(told: Told, flaw: str) -> None:
    assert _apart(told[2][0][flaw], told[1][0]["gpt"]) > 1e-3


def test_ranks_drop_other_heads_and_the_same_of_the_stream(told: Told) -> None:
    first, second = (told[2][rank]["draws"] for rank in (0, 1))
    assert first["inside"] != second["inside"]
    assert first["after"] == second["after"]
    assert told[2][0]["dropout"]["loss"] == told[2][1]["dropout"]["loss"]
    assert _apart(told[2][0]["dropout"], told[1][0]["gpt"]) > 1e-3


def test_a_rank_holds_its_part_of_the_weights(told: Told) -> None:
    """All but norms and the biases of the projections back, which all ranks of a group have."""
    for model in MODELS:
        whole = told[1][0][model]["bytes"]
        for size in (2, 4):
            assert whole / size <= told[size][0][model]["bytes"] <= 1.06 * whole / size


# --- the whole loop ---


def test_tensor_and_ranks_change_at_every_resume(corpus: Path, tmp_path: Path) -> None:
    """Two ranks that divide the layers, three that do not, four that do both: one run, that of one process."""
    alone = Gang(tmp_path / "alone", _recipe(corpus, tensor=1, steps=8), every=1000).run()
    layouts = [(2, 2, 3), (3, 1, 5), (4, 2, 8)]
    for attempt, (world, tensor, steps) in enumerate(layouts, start=1):
        recipe = _recipe(corpus, tensor=tensor, steps=steps)
        gang = Gang(tmp_path / "shared", recipe, world=world, attempt=attempt, every=1000).run()
        found = gang.losses()
        assert [min(found), max(found)] == [1 if attempt == 1 else layouts[attempt - 2][2] + 1, steps]
        for column, tolerance in (("loss", 1e-6), ("gradNorm", 1e-5)):
            ours, theirs = gang.column(column), alone.column(column)
            assert max(abs(ours[step] / theirs[step] - 1) for step in ours) <= tolerance
        assert gang.column("tokens") == {step: alone.column("tokens")[step] for step in found}
        (order,) = gang.events("collectives")
        assert order["ranksInAnotherOrder"] == []
        # Micro-batches of two sequences of width 32: each layer sums once forward and once backward, and the loss once.
        sums = Counter(line.removeprefix("all-reduce ") for line in order["order"] if line.startswith("all-reduce"))
        layers = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attention", "feed_forward")]
        passes = SEQUENCES // 2 // (world // tensor)
        wanted = {f"{layer} 2048 float32": 2 * passes for layer in layers}
        wanted |= {"root 2048 float32": passes, "root 1 float32": passes}
        assert sums == (wanted if tensor > 1 else {})
    (step, ours_at), (_, theirs_at) = (saved_weights(g.checkpoints, g.recipe) for g in (gang, alone))
    assert step == 8
    names = [name for name in theirs_at if not name.endswith("k_proj.bias")]
    difference = torch.cat([(ours_at[name] - theirs_at[name]).abs().flatten() for name in names])
    assert float((difference > 1e-6).float().mean()) <= 5e-3
    assert float(difference.max()) <= 1e-4


def test_few_shot_learns_the_same(tmp_path: Path) -> None:
    """Its embeddings are learned beside the weights, by gradients of what goes into the first block."""
    recipe = few_shot_recipe(steps=3)
    alone = Gang(tmp_path / "alone", recipe, checkpoint=False).run()
    gang = Gang(tmp_path, {**recipe, "parallelism": {"tensor": 2}}, world=2, checkpoint=False).run()
    for column in ("loss", "gradNorm"):
        ours, theirs = gang.column(column), alone.column(column)
        assert max(abs(ours[step] / theirs[step] - 1) for step in theirs) <= 1e-5
    (found,), (wanted,) = gang.events("evaluation"), alone.events("evaluation")
    assert found["accuracy"] == wanted["accuracy"]
    assert found["answerLoss"] == pytest.approx(wanted["answerLoss"], rel=1e-5)


# --- what is refused ---


@pytest.mark.parametrize(
    ("model", "changes", "line"),
    [
        ("opt", {"tensor": 3}, "parallelism.tensor: must divide heads of opt-tiny, 4; got 3; set 2$"),
        (
            "opt", {"overrides": {"feedForwardWidth": 129}},
            "parallelism.tensor: must divide feedForwardWidth of opt-tiny, 129; got 2; set 1$",
        ),
        ("moe", {"overrides": {"experts": 5}}, "parallelism.tensor: must divide experts of moe-tiny, 5; got 2; set 1$"),
        ("gmlp", {}, "parallelism.tensor: must be 1 for gmlp-tiny, which has no attention heads to divide; use shard"),
        ("smlp", {}, "parallelism.tensor: must be 1 for smlp-tiny, .* share the experts out with parallelism.expert"),
        ("growing", {}, "parallelism.tensor: must be 1 for growing-tiny, which grows"),
        ("ensemble", {}, "parallelism.tensor: must be 1 for ensemble-tiny, which is an ensemble; use shard"),
        (
            "opt", {"compile": True, "overrides": {"attentionDropout": 0.1}},
            "parallelism.tensor: not with compile and attention dropout: .*; set model.overrides.attentionDropout: 0",
        ),
        ("moe", {"parallelism": {"expert": 2}}, "parallelism.tensor: 2 goes not with parallelism.expert: 2; .* to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused_in_one_line(model: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidSpec, match=f"^{line}"):
        check_recipe(Recipe.model_validate(_recipe(Path("/nowhere"), model, **changes)))


def _told(recipe: dict[str, Any], replicas: dict[str, Any], procs: int) -> list[str]:
    spec = {
        "recipe": recipe | {"data": {"sources": [{"path": "pvc://c/d"}], "sequenceLength": 32}},
        "checkpoint": {"uri": "pvc://c/k"}, "procsPerNode": procs, "replicas": replicas,
        "template": {"image": "trireme"},
    }  # fmt: skip
    return [str(problem) for problem in check_spec(parse_spec(spec))]


def test_every_size_of_the_gang_must_be_whole_groups() -> None:
    four = _recipe(Path("/nowhere"), tensor=4)
    (line,) = _told(four, {"desired": 4, "min": 2}, 2)
    assert line.startswith("spec.recipe.parallelism.tensor: 4 does not divide 6 ranks, the gang of 3 nodes")
    assert line.endswith("set spec.replicas.allowed to multiples of 2")
    assert _told(four, {"desired": 4, "allowed": [2, 4]}, 2) == []
    spec = Recipe.model_validate(four).parallelism
    spec.check_ranks(8)
    with pytest.raises(InvalidSpec, match=r"^parallelism.tensor: 4 does not divide 6 ranks; .* or set 2$"):
        spec.check_ranks(6)


def test_a_gang_may_have_a_tensor_group_for_each_sequence() -> None:
    """Twelve sequences a step: twelve ranks that divide nothing, 48 in groups of four."""
    assert _told(_recipe(Path("/nowhere"), tensor=4), {"desired": 12, "max": 12}, 4) == []
    for tensor, most in ((1, 3), (2, 6)):
        (line,) = _told(_recipe(Path("/nowhere"), tensor=tensor), {"desired": 12, "max": 12}, 4)
        assert line.startswith("spec.replicas.max: 12 nodes are 48 ranks, but a batch of 384 tokens has only 12")
        assert f"use at most {most} nodes" in line


def test_the_ranks_of_a_tensor_group_follow_each_other() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    recipe = _recipe(Path("/nowhere"), parallelism={"shard": "hybrid", "shardSize": 4})
    spec = Recipe.model_validate(recipe).parallelism
    mesh = build_tensor_mesh(spec, World(5, 8, 0, 8, CPU, 2))
    assert mesh is not None
    assert mesh.mesh_dim_names == ("replicate", "shard", "tensor")
    assert [mesh[name].mesh.tolist() for name in mesh.mesh_dim_names] == [[1, 5], [5, 7], [4, 5]]
    dist.destroy_process_group()
