"""Ensembles of language models: members trained as if alone, answers averaged, and a growing one in a stream."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from gang import SEQUENCE, Gang, make_recipe
from test_anytime_run import disturbed, recipe, sessions
from test_grow import OVERRIDES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trireme_api.evaluation import HeldOutSource
from trireme_api.families import check_recipe, restore
from trireme_api.families.ensemble import EnsembleConfig
from trireme_api.recipe import Recipe
from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.loader import load_newest
from trireme_trainer.checkpoint.ranks import Ranks
from trireme_trainer.data.shards import Corpus
from trireme_trainer.evaluation import scoring
from trireme_trainer.evaluation.held_out import Opened, open_text
from trireme_trainer.families import build
from trireme_trainer.families.ensemble import EnsembleModel
from trireme_trainer.objectives.text import NextToken
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"), 1)
GROWING = {"preset": "growing-ensemble-tiny", "overrides": OVERRIDES}
FIXED = {"preset": "ensemble-tiny", "overrides": OVERRIDES}
STEPS = 12


def made(model: dict[str, Any], corpus: Path, members: int = 0) -> tuple[EnsembleModel, Recipe, EnsembleConfig]:
    spec = Recipe.model_validate(make_recipe(corpus, model=model))
    config = check_recipe(spec)
    assert isinstance(config, EnsembleConfig)
    config = config.grown(members - config.members) if members else config
    model_ = build(config)
    assert isinstance(model_, EnsembleModel)
    initialise(model_, spec.seed)
    return model_, spec, config


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def test_each_member_learns_as_if_alone(corpus: Path) -> None:
    """From values and blocks of its own; and the FLOPs are the stated ones."""
    model, spec, config = made(FIXED, corpus)
    first, second = model.parts()
    assert not torch.equal(first.embed_tokens.weight, second.embed_tokens.weight)  # type: ignore[arg-type]
    objective = NextToken(spec, config, ALONE, None)
    with objective.batches(0, 1, False) as batches:
        batch = batches.micro_batches(0)[0]
    valid = torch.tensor(float(batch.targets.numel()))
    with FlopCounterMode(display=False) as counter:
        loss = objective.learn(model, batch, valid, None, lambda: None)
    # The CPU's kernel of attention is not counted.
    one = config.member.forward_flops_per_token(SEQUENCE, causal=False) - 4 * config.layers * config.width * SEQUENCE
    assert counter.get_total_flops() == 3 * config.turns * one * objective.trained_tokens(float(valid))
    rows = batch.tokens.shape[0] // 2
    assert torch.equal(batch.tokens[0], torch.from_numpy(objective.samples.sample(0)[:-1]))
    assert not torch.equal(batch.tokens[:rows], batch.tokens[rows:])
    plain = []
    for number, member in enumerate((first, second)):
        gradients = [p.grad.clone() for p in member.parameters() if p.grad is not None]
        member.zero_grad()
        own = slice(number * rows, (number + 1) * rows)
        alone = cross_entropy(member(batch.tokens[own]), batch.targets[own]) / batch.targets[own].numel()
        alone.backward()
        plain.append(float(alone.detach()))
        for ours, theirs in zip(gradients, member.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-7)
    assert float(loss) == pytest.approx(sum(plain) / 2, abs=1e-5)


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_the_answer_is_the_average(corpus: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is evaluated, chunk by chunk; and not the other average."""
    model, _, _ = made(FIXED if kind == "probabilities" else GROWING, corpus, members=3)
    monkeypatch.setattr(scoring, "positions_at_once", lambda _: 5)
    tokens = torch.randint(4, 380, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    places = torch.arange(2 * SEQUENCE)
    with torch.no_grad():
        found = scoring.token_scores(model, tokens[:, :-1], places, tokens[:, 1:].flatten())[:, 0]
        logits = torch.stack([member(tokens[:, :-1]) for member in model.parts()]).double()
    averages = {"probabilities": logits.softmax(-1).mean(0).log(), "logits": logits.mean(0).log_softmax(-1)}
    targets = tokens[:, 1:].flatten()
    expected = {name: value.flatten(0, 1)[places, targets].float() for name, value in averages.items()}
    assert (found - expected.pop(kind)).abs().max() <= 1e-5
    assert (found - next(iter(expected.values()))).abs().max() > 1e-4


def test_older_members_learn_nothing(corpus: Path) -> None:
    model, spec, config = made(GROWING, corpus, members=3)
    objective = NextToken(spec, config, ALONE, None)
    with objective.batches(0, 1, False) as batches:
        batch = batches.micro_batches(0)[0]
    objective.learn(model, batch, torch.tensor(1.0), None, lambda: None)
    learnt = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt == {"2"}


def state(root: Path, step: int) -> tuple[EnsembleConfig, dict[str, Tensor]]:
    """Weights, and moments of what has some."""
    store = CheckpointStore(str(root / "checkpoints"))
    manifest, _ = store.inspect(next(c for c in store.candidates() if c.step == step))
    assert manifest is not None
    config = restore(manifest.meta["model"])
    assert isinstance(config, EnsembleConfig)
    shapes = {name: (p.shape, p.requires_grad) for name, p in build(config).named_parameters()}
    flat = {f"model.{name}": torch.empty(shape) for name, (shape, _) in shapes.items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        flat |= {f"optimizer.{kind}.{name}": torch.empty(shape) for name, (shape, learns) in shapes.items() if learns}
    assert load_newest(store, Ranks(), flat | {"optimizer.step": torch.zeros(())}, strict=True, at_most=step)
    return config, flat


def member(flat: dict[str, Tensor], number: int, what: str = "model") -> list[Tensor]:
    return [tensor for name, tensor in flat.items() if name.startswith(f"{what}.members.{number}.")]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs) > 0
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def streamed(stream: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    spec = recipe(stream, model=model, **changes)
    return {**spec, "evaluation": {"heldOut": False, "sources": [{"path": str(stream / "mega-1")}]}}


@pytest.fixture(scope="module")
def alone(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    root = tmp_path_factory.mktemp("alone")
    return root, sessions(root, streamed(stream, GROWING, growEvery=1), [1, 1, 1])


def test_each_session_adds_a_copy_and_trains_it_alone(alone: tuple[Path, dict[int, float]], stream: Path) -> None:
    root, losses = alone
    assert sorted(losses) == list(range(1, STEPS + 1))
    (one, first), (two, second), (three, third) = (state(root, step) for step in (4, 8, 12))
    assert (one.members, two.members, three.members) == (1, 2, 3)
    assert same(member(first, 0), member(second, 0))
    assert same(member(first, 0), member(third, 0))
    assert same(member(second, 1), member(third, 1))
    assert not same(member(third, 1), member(third, 2))
    assert not member(third, 1, "optimizer.exp_avg")
    assert all(bool(tensor.any()) for tensor in member(third, 2, "optimizer.exp_avg_sq"))
    gang = Gang(root, {}, attempt=3)
    (grown,), (ended,) = gang.events("grown"), gang.events("session-ended")
    assert (grown["members"], grown["difference"]) == (3, 0.0)
    size = three.member.parameters().total
    assert grown["parameters"] == ended["parameters"] == 3 * size
    assert ended["cumulative"]["parameters"] == 6 * size
    assert ended["cumulative"]["flops"] == pytest.approx(3 * ended["flops"])
    # What was evaluated, plainly.
    path = str(stream / "mega-1")
    source = HeldOutSource(path=path)
    text = open_text(Opened(path, source, Corpus(path)), SEQUENCE, None)
    model = build(three).eval()
    model.load_state_dict({name.removeprefix("model."): t for name, t in third.items() if name.startswith("model.")})
    nats = 0.0
    for window in text.windows:
        tokens = torch.from_numpy(window.tokens)
        with torch.no_grad():
            logits = torch.stack([part(tokens[None, :-1]) for part in model.parts()]).mean(0)[0]
        nats += float(cross_entropy(logits[-window.scored :], tokens[-window.scored :]))
    assert ended["nats"] == pytest.approx(nats, rel=1e-5)


def test_the_same_at_any_number_of_ranks_with_a_crash_after_growth(
    stream: Path, alone: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    spec = streamed(stream, GROWING, growEvery=1)
    losses, last = disturbed(tmp_path, spec, keep=9)
    assert max(abs(losses[step] - alone[1][step]) for step in alone[1]) <= 1e-5
    ours, theirs = last.events("session-ended")[0], Gang(alone[0], {}, attempt=3).events("session-ended")[0]
    assert ours["nats"] == pytest.approx(theirs["nats"], rel=1e-5)
    # Through three attempts on two and three ranks the older members are what they were.
    (_, before), (_, after) = (state(tmp_path, step) for step in (8, 12))
    assert same(member(before, 0), member(after, 0))
    assert same(member(before, 1), member(after, 1))
    assert not same(member(before, 1), member(after, 2))


def test_a_copy_learns_on_as_the_model_it_was_copied_from(
    stream: Path, alone: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    """Weights and moments: the losses are those without growth. The answers are not."""
    single = sessions(tmp_path, streamed(stream, GROWING), [1, 1, 1])
    assert max(abs(single[step] - alone[1][step]) for step in alone[1]) <= 1e-6
    (one,), (other,) = (Gang(root, {}, attempt=3).events("session-ended") for root in (tmp_path, alone[0]))
    assert one["parameters"] == other["parameters"] / 3
    assert abs(one["nats"] - other["nats"]) > 1


def test_a_fixed_one_in_a_stream_keeps_its_size(stream: Path, tmp_path: Path) -> None:
    spec = streamed(stream, FIXED, batches=2, steps=4)
    found = sessions(tmp_path, spec, [2, 1])
    assert sorted(found) == [1, 2, 3, 4]
    (ended,) = Gang(tmp_path, {}, attempt=2).events("session-ended")
    config = check_recipe(Recipe.model_validate(spec))
    assert ended["parameters"] == config.parameters().total == 2 * config.member.parameters().total
    assert ended["growths"] == 0
    assert ended["flops"] == 2 * config.member.train_flops_per_token(SEQUENCE) * 2 * spec["batch"]["tokens"]
