"""A language model that grows between two sessions of training: `trireme grow` as a user types it, before and after it
the trainer itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from gang import SEQUENCE, Gang, make_recipe
from reference import largest_difference
from torch.utils.flop_counter import FlopCounterMode
from trireme_api.families import resolve, restore
from trireme_api.families.growing import GrowingConfig
from trireme_api.protocol import ExitCode
from trireme_api.recipe import ModelSpec, Recipe
from trireme_cli.grow import grow
from trireme_trainer.anytime.language import divide
from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.loader import load_newest
from trireme_trainer.checkpoint.ranks import Ranks
from trireme_trainer.checkpoint.state import flatten
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.prepare import Options, prepare
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.layers.soft_experts import SoftExperts

OVERRIDES = {"width": 32, "vocabularySize": 384, "dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": SEQUENCE}
MODEL = {"preset": "growing-tiny", "overrides": OVERRIDES}
TOKENS = torch.randint(4, 380, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(grow, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def mega_batches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two directories of shards of one text, the second with the tokenizer of the first."""
    root = tmp_path_factory.mktemp("stream")
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text().split("\n\n")
    tokenizer: Path | None = None
    for number in range(2):
        (root / f"{number}.txt").write_text("\n\n".join(text[number::2]))
        options = {"tokenizer": str(tokenizer)} if tokenizer else {"vocabulary": 384}
        prepare(
            [str(root / f"{number}.txt")],
            str(root / str(number)),
            Options(separator="blank-line", valid_fraction=0.2, **options),
        )
        tokenizer = root / "0" / "tokenizer.json"
    return [root / "0", root / "1"]


def recipe(data: Path, steps: int, model: dict[str, Any] = MODEL) -> dict[str, Any]:
    spec = make_recipe(data, steps=steps, model=model)
    return {**spec, "schedule": {**spec["schedule"], "decay": "constant"}}


def whole_state(root: Path) -> tuple[GrowingConfig, dict[str, torch.Tensor], dict[str, Any]]:
    store = CheckpointStore(str(root))
    manifest, _ = store.inspect(max(store.candidates(), key=lambda candidate: candidate.step))
    assert manifest is not None
    config = restore(manifest.meta["model"])
    assert isinstance(config, GrowingConfig)
    weights = {name: torch.empty(p.shape) for name, p in build(config).named_parameters()}
    state: dict[str, Any] = {"model": weights, "optimizer": {"step": torch.zeros(())}}
    for kind in ("exp_avg", "exp_avg_sq"):
        state["optimizer"][kind] = {name: torch.empty_like(w) for name, w in weights.items()}
    flat = flatten(state)
    assert load_newest(store, Ranks(), flat, strict=True) is not None
    return config, flat, dict(manifest.meta)


def model_of(config: GrowingConfig, flat: dict[str, torch.Tensor]) -> LanguageModel:
    model = build(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(flat[f"model.{name}"])
    return model


@pytest.fixture(scope="module")
def session(mega_batches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Gang:
    return Gang(tmp_path_factory.mktemp("session"), recipe(mega_batches[0], 4), world=2).run()


@pytest.fixture(scope="module")
def grown(session: Gang, mega_batches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    target = tmp_path_factory.mktemp("grown") / "checkpoints"
    result = run(session.checkpoints, target, "--data", mega_batches[1], "--blocks", 8, "--json")
    assert result.exit_code == 0, result.output
    return target, json.loads(result.stdout)


def test_growth_changes_capacity_alone(session: Gang, grown: tuple[Path, dict]) -> None:
    small, before, _ = whole_state(session.checkpoints)
    large, after, meta = whole_state(grown[0])
    assert (meta["step"], large.splits, small.splits) == (4, "0;0", "")
    assert (model_of(large, after)(TOKENS) - model_of(small, before)(TOKENS)).abs().max() <= 1e-5
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        if ".experts.0." in name:
            assert torch.equal(after[name.replace(".experts.0.", ".experts.1.")], tensor), name
    new = {name for name in after if ".gates." in name}
    assert len(new) == 2 * 2 * 3
    assert all(bool(after[name].any()) == name.startswith("model.") for name in new)
    assert after["optimizer.exp_avg_sq.blocks.0.feed_forward.experts.1.fc1.weight"].any()
    assert grown[1]["parameters"] - small.parameters().total == 2 * (2 * 32 * 128 + 128 + 32 + 2 * 32 + 2)


def test_a_gate_that_does_not_share_out_one_would_be_seen(session: Gang, grown: tuple[Path, dict]) -> None:
    """Negative control."""
    small, before, _ = whole_state(session.checkpoints)
    large, after, _ = whole_state(grown[0])
    model = model_of(large, after)
    for module in model.modules():
        if isinstance(module, SoftExperts):
            module.shares = lambda x: [torch.full((*x.shape[:-1], 1), 0.6)] * 2  # type: ignore[method-assign]
    assert (model(TOKENS) - model_of(small, before)(TOKENS)).abs().max() > 1e-3


def test_training_goes_on_with_new_data_at_any_world_size(
    session: Gang, grown: tuple[Path, dict], mega_batches: list[Path], tmp_path: Path
) -> None:
    target, told = grown
    gangs = {}
    for name, worlds in (("straight", [(1, 8)]), ("interrupted", [(2, 6), (3, 8)])):
        shutil.copytree(target, tmp_path / name / "checkpoints")
        losses: dict[int, float] = {}
        for attempt, (world, steps) in enumerate(worlds, start=1):
            spec = recipe(mega_batches[1], steps, told["model"])
            gang = Gang(tmp_path / name, spec, world=world, attempt=attempt).run()
            losses.update(gang.losses())
        gangs[name] = losses
    assert sorted(gangs["straight"]) == [5, 6, 7, 8]
    assert largest_difference(gangs["interrupted"], gangs["straight"]) <= 1e-5
    # The first step of the new session is the function that was grown, on the new mega-batch.
    small, before, _ = whole_state(session.checkpoints)
    mixture = Mixture.from_recipe(Recipe.model_validate(recipe(mega_batches[1], 8)))
    blocks = torch.stack([torch.from_numpy(mixture.sample(4 * 12 + row)) for row in range(12)])
    logits = model_of(small, before)(blocks[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert gangs["straight"][5] == pytest.approx(float(loss), abs=1e-5)
    _, after, _ = whole_state(tmp_path / "straight" / "checkpoints")
    fc1 = "model.blocks.0.feed_forward.experts.{}.fc1.weight"
    assert not torch.equal(after[fc1.format(0)], after[fc1.format(1)]), "the copies drift apart"
    again = run(tmp_path / "straight" / "checkpoints", tmp_path / "twice", "--data", mega_batches[1], "--json")
    assert again.exit_code == 0, again.output
    second = json.loads(again.stdout)
    for shares, chosen in zip(second["usage"], second["split"], strict=True):
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert shares[chosen] == max(shares)
    assert second["model"]["overrides"]["splits"] == ";".join(f"0,{chosen}" for chosen in second["split"])


def test_splits_nest() -> None:
    """Both experts of a tree split, in either order of layers: one function, shares that sum to 1."""
    config = GrowingConfig(layers=2, width=32, heads=2, vocabulary_size=384, maximum_positions=32, splits="0,1;0,0")
    model = build(config).eval().requires_grad_(False)
    bigger = build(config.model_copy(update={"splits": "0,1,2;0,0,0"})).eval().requires_grad_(False)
    bigger.load_state_dict(divide(dict(model.named_parameters()), (2, 0), bigger, 1), strict=False)
    assert (bigger(TOKENS) - model(TOKENS)).abs().max() <= 1e-5
    layer = next(module for module in bigger.modules() if isinstance(module, SoftExperts))
    assert torch.allclose(torch.cat(layer.shares(torch.randn(2, 3, 32)), -1).sum(-1), torch.ones(2, 3))


def test_arithmetic_is_that_of_the_modules() -> None:
    config = GrowingConfig(layers=2, width=32, heads=2, vocabulary_size=384, maximum_positions=32, splits="0,1;0,0")
    model = build(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters().total
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(TOKENS)
    assert counter.get_total_flops() == TOKENS.numel() * config.forward_flops_per_token(SEQUENCE, causal=False)


@pytest.mark.parametrize(
    ("splits", "words"),
    [("0", "all 2 layers"), ("0,1;0", "as many"), ("1;0", "none numbered 1"), ("a;b", "numbers apart")],
)
def test_trees_that_cannot_be(splits: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(ModelSpec(preset="growing-tiny", overrides={"splits": splits}))


def test_what_cannot_grow_is_refused(
    session: Gang, grown: tuple[Path, dict], mega_batches: list[Path], corpus: Path, tmp_path: Path
) -> None:
    data = ("--data", mega_batches[1])
    taken = run(session.checkpoints, grown[0], *data)
    assert taken.exit_code == ExitCode.CHECKPOINT_IO
    assert "holds checkpoints already" in taken.output
    nothing = run(tmp_path / "none", tmp_path / "out", *data)
    assert nothing.exit_code == ExitCode.CHECKPOINT_IO
    empty = run(session.checkpoints, tmp_path / "out", "--data", corpus)
    assert empty.exit_code == ExitCode.BAD_DATA
    assert "no held-out block" in empty.output
    absent = run(session.checkpoints, tmp_path / "out", "--data", tmp_path / "nowhere")
    assert absent.exit_code == ExitCode.BAD_DATA
    assert "--data: " in absent.output
    assert "no such directory" in absent.output
    opt = Gang(tmp_path / "opt", make_recipe(mega_batches[0], steps=1)).run()
    other = run(opt.checkpoints, tmp_path / "out", *data)
    assert other.exit_code == ExitCode.BAD_DATA
    assert "opt cannot grow" in other.output
    assert not (tmp_path / "out").exists()
