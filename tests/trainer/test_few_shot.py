"""TAM: embeddings and weights optimised in turn. Hard gates: weights frozen bit for bit in adaptation, the weights'
gradient against a hand sum, the task read from its embedding alone, the same training on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gang import Gang
from reference import fresh_model
from torch import Tensor
from trireme_api.families import check_recipe
from trireme_api.fewshot import most_answers
from trireme_api.recipe import Recipe
from trireme_cli.evaluate import evaluate
from trireme_trainer.families import LanguageModel
from trireme_trainer.fewshot.baselines import MULTITASK, NO_ADAPTATION, Cavia, MatchingNetworks
from trireme_trainer.fewshot.embedding import TaskEmbeddings, task_token
from trireme_trainer.fewshot.episodes import EpisodeBatch, Episodes, joined
from trireme_trainer.fewshot.evaluate import Few, counts
from trireme_trainer.fewshot.inner import adapt, answer_losses
from trireme_trainer.fewshot.tasks import FAMILIES, IGNORED, TASK
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.parallel.world import World
from trireme_trainer.settings import Settings

LENGTH, EXAMPLES = 8, 6
LENGTHS = {"classification": 8, "transduction": 13, "path-finding": 12}


def make(tasks: str = "classification", *, steps: int = 4, micro: int = EXAMPLES, **few: Any) -> dict[str, Any]:
    length = LENGTHS[tasks]
    return {
        "model": {
            "preset": "opt-tiny",
            "overrides": {
                "dropout": 0.0, "attentionDropout": 0.0, "width": 16, "embeddingWidth": 16, "feedForwardWidth": 32,
                "maximumPositions": length, "vocabularySize": 24, "initialStd": 0.1,
            },
        },
        "objective": "few-shot",
        "fewShot": {"examples": EXAMPLES, "innerSteps": 3, "heldOutTasks": 3, "shots": [0, 4], "queries": 5, **few},
        "data": {"sources": [{"path": f"tasks://{tasks}"}], "sequenceLength": length},
        "batch": {"tokens": 4 * EXAMPLES * length, "micro": micro},
        "optimizer": {"learningRate": 1e-3},
        "schedule": {"warmupTokens": 0},
        "precision": "fp32",
        "until": {"steps": steps},
    }  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    joined = World.join(Settings(Recipe.model_validate(make()), None))
    yield joined
    joined.leave()


def objective(
    world: World, kind: type[FewShot] = FewShot, **few: Any
) -> tuple[FewShot, LanguageModel, EpisodeBatch]:
    recipe = make(**few)
    spec = Recipe.model_validate(recipe)
    made = kind(spec, check_recipe(spec), world)
    with made.batches(0, 1, False) as batches:
        batch = batches.micro_batches(0)[0]
    assert isinstance(batch, EpisodeBatch)
    return made, fresh_model(recipe), batch


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_hand(model: LanguageModel, batch: EpisodeBatch, steps: int, rate: float) -> list[Tensor]:
    """Embeddings z_0 … z_S of the batch's one task."""
    path = [torch.zeros(16)]
    for _ in range(steps):
        z = path[-1].clone().requires_grad_(True)
        answer_losses(model, batch.tokens, batch.targets, z.expand(len(batch.tokens), -1)).mean().backward()
        assert z.grad is not None
        path.append((z - rate * z.grad).detach())
    model.zero_grad()
    return path


@pytest.mark.parametrize("outer", ["accumulate", "final"])
def test_the_weights_gradient_is_the_hand_sum_at_constant_embeddings(world: World, outer: str) -> None:
    made, model, batch = objective(world, outerGrad=outer)
    turns: list[int] = []
    valid = torch.tensor(50.0)
    loss = made.learn(model, batch, valid, None, lambda: turns.append(1))
    found = gradients(model)
    assert len(turns) == made.passes == (3 if outer == "accumulate" else 4)
    path = by_hand(model, batch, 3, made._spec.inner_learning_rate)
    last = torch.zeros(())
    for z in path[:-1] if outer == "accumulate" else path[-1:]:
        last = answer_losses(model, batch.tokens, batch.targets, z.expand(EXAMPLES, -1)).sum() / valid
        last.backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert abs(float(loss) - float(last.detach())) < 1e-6


def cavia_by_hand(model: LanguageModel, batch: EpisodeBatch, steps: int, z_1: Tensor) -> Tensor:
    """Loss after `steps` steps from z_1, [1, 16], all of it one graph."""
    for _ in range(steps):
        loss = answer_losses(model, batch.tokens, batch.targets, z_1.expand(EXAMPLES, -1)).mean()
        z_1 = z_1 - torch.autograd.grad(loss, [z_1], create_graph=True)[0]
    return answer_losses(model, batch.tokens, batch.targets, z_1.expand(EXAMPLES, -1)).mean()


def test_cavias_gradient_of_weights_is_second_order_and_tams_first(world: World) -> None:
    """Against differences: a weight's derivative of the loss after the steps, and of it at their embeddings held."""
    weight = "blocks.0.feed_forward.fc1.weight"
    found = {}
    for kind in (Cavia, FewShot):
        made, model, batch = objective(world, kind, outerGrad="final")
        made.learn(model, batch, torch.tensor(float(EXAMPLES)), None, lambda: None)
        found[kind] = gradients(model)[weight]
    direction = torch.sign(found[Cavia] - found[FewShot])
    model, values = model.double(), []
    for sign in (1, -1):
        with torch.no_grad():
            model.get_parameter(weight).add_(sign * 1e-5 * direction)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            z = torch.zeros(1, 16, dtype=torch.float64, requires_grad=True)
            values.append(float(cavia_by_hand(model, batch, 3, z).detach()))
        with torch.no_grad():
            model.get_parameter(weight).sub_(sign * 1e-5 * direction)
    numeric = (values[0] - values[1]) / 2e-5
    assert float((found[Cavia] * direction).sum()) == pytest.approx(numeric, rel=1e-2)
    assert float((found[FewShot] * direction).sum()) != pytest.approx(numeric, rel=1e-1)


def test_multitask_is_one_pass_for_weights_and_embedding_and_no_adaptation_moves_none(world: World) -> None:
    made, model, batch = objective(world, **MULTITASK)
    task = batch.tasks[0]
    assert task is not None
    valid = torch.tensor(float(EXAMPLES))
    made.learn(model, batch, valid, None, lambda: None)
    z = torch.zeros(1, 16, requires_grad=True)
    found = gradients(model)
    answer_losses(model, batch.tokens, batch.targets, z.expand(EXAMPLES, -1)).mean().backward()
    assert z.grad is not None
    torch.testing.assert_close(made.embeddings.moved[task, :-1], -z.grad[0], rtol=1e-4, atol=1e-7)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
    blind, model, batch = objective(world, **NO_ADAPTATION)
    blind.learn(model, batch, valid, None, lambda: None)
    assert (blind.passes, blind.embeddings.keeps) == (1, False)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=f"{name}: zero is what it reads")


def test_matching_networks_look_answers_up(world: World) -> None:
    """Asked for the very examples they know, they are right; with the answers of other examples they are not."""
    made, model, batch = objective(world, MatchingNetworks, tasks="path-finding", shots=[1, 12], queries=20)
    assert isinstance(made, MatchingNetworks)
    asked = batch.targets != IGNORED
    with torch.no_grad():
        places = made._places(model, batch.tokens, asked)
    answers = batch.targets[asked]
    told = made._looked_up(places, answers, places)
    torch.testing.assert_close(told.exp().sum(-1), torch.ones(len(answers)))
    # Equal prompts and beginnings of answers have equal places: the nearest is one's own or its equal.
    sharp = (told.argmax(-1) == answers).float().mean()
    turned = (made._looked_up(places, answers.roll(1), places).argmax(-1) == answers).float().mean()
    assert sharp > 0.9 > turned
    made.learn(model, batch, torch.tensor(float(len(answers))), None, lambda: None)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    figures = made.evaluate(model, lambda: None)
    assert all(0 < accuracy < 1 for accuracy in figures["accuracy"])
    with pytest.raises(ValueError, match="leave out 0"):
        objective(world, MatchingNetworks)


def test_tasks_evaluated_at_once_are_as_one_by_one(world: World) -> None:
    made, model, _ = objective(world, tasks="path-finding", adaptationSteps=3)
    how, tasks = Few(4, 3, 1.0, 5), made.samples.held_out
    together = made.learned_from(model, tasks, how)
    alone = torch.cat([made.learned_from(model, [task], how) for task in tasks])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (together[:, 1] > 5).all()
    targets = torch.tensor([[IGNORED, 1], [2, 0], [IGNORED, 2]])
    log_p = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    by_hand = torch.tensor([[1.0, 1, -np.log(0.8)], [1, 2, -np.log(0.25 * 0.5)], [1, 1, -np.log(0.6)]])
    torch.testing.assert_close(counts(log_p, targets, 3), by_hand.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("few", "named"),
    [({"innerSteps": 0}, "innerSteps"), ({"shots": [-1]}, "shots"), ({"shots": []}, "shots")],
)
def test_few_shot_settings_that_say_nothing_are_named(few: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Recipe.model_validate(make(**few))


def test_adaptation_leaves_every_weight_bit_for_bit_and_without_a_gradient(world: World) -> None:
    made, model, batch = objective(world)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    begin = torch.zeros(16)
    z = adapt(model, batch.tokens, batch.targets, begin[None], steps=5, learning_rate=1.0)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert float(z.norm()) > 0
    assert not begin.any()
    rows = z.expand(len(batch.tokens), -1)
    fitted = answer_losses(model, batch.tokens, batch.targets, rows).mean()
    assert fitted < answer_losses(model, batch.tokens, batch.targets, torch.zeros_like(rows)).mean()
    made.evaluate(model, lambda: None)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_loss_scale_and_the_rest_of_the_step_drop_out_of_the_embedding(world: World) -> None:
    made, model, batch = objective(world, embedding="persist")
    task = batch.tasks[0]
    assert task is not None
    made.learn(model, batch, torch.tensor(6.0), None, lambda: None)
    alone = made.embeddings.moved.clone()
    plain = gradients(model)
    made.embeddings.reset()
    made.learn(model, batch, torch.tensor(600.0), torch.tensor(64.0), lambda: None)
    torch.testing.assert_close(made.embeddings.moved, alone, rtol=1e-4, atol=1e-6)
    assert float(alone[task, -1]) == 1
    for name, scaled in gradients(model).items():
        torch.testing.assert_close(scaled * 100 / 64, plain[name], rtol=1e-3, atol=1e-6)


def test_the_task_token_takes_the_place_of_the_tables_row(world: World) -> None:
    _, model, batch = objective(world)
    z = torch.randn(len(batch.tokens), 16)
    with torch.no_grad(), task_token(model, z):
        one = model(batch.tokens)
        model.get_parameter("embed_tokens.weight")[TASK] += 1.0
        # Tied: the row is the output layer's too.
        assert torch.equal(model(batch.tokens)[..., TASK + 1 :], one[..., TASK + 1 :])
    with torch.no_grad():
        assert not torch.equal(model(batch.tokens)[..., TASK + 1 :], one[..., TASK + 1 :])


def test_embeddings_begin_at_zero_where_they_ended_or_at_the_sum_of_primitives() -> None:
    tasks = [(0, 2), (0, 3), (1, 2), (1, 3)]
    by, keep, skip = torch.tensor([2.0, -4.0]), torch.tensor(0.0), torch.tensor(1.0)
    for begin, rows in (("reset", 0), ("persist", 4), ("compositional", 4)):
        made = TaskEmbeddings(begin, tasks, 4, 2)  # type: ignore[arg-type]
        assert made.table.shape == (rows, 2)
        made.went(0, by)
        made.apply(made.moved.clone(), skip)
        assert not made.of([0, 1, 2, 3]).any(), "a skipped step moves nothing"
        made.went(0, by)
        made.went(0, 3 * by)
        made.apply(made.moved.clone(), keep)
        zero = torch.zeros(2)
        expected = {
            "reset": [zero, zero, zero, zero],
            "persist": [2 * by, zero, zero, zero],
            "compositional": [2 * by, by, by, zero],
        }[begin]
        assert torch.equal(made.of([0, 1, 2, 3]), torch.stack(expected))
        unseen = {"reset": zero, "persist": by, "compositional": by}[begin]
        assert torch.equal(made.unseen(2, [0, 1]), unseen)


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_of_a_family_need_their_embedding(name: str) -> None:
    """Same prompts, other answers; held-out tasks are unseen combinations of seen primitives."""
    spec = Recipe.model_validate(make(name))
    episodes = Episodes.from_recipe(spec)
    family = episodes.family
    assert not set(episodes.held_out) & set(episodes.trained)
    assert len(set(family.tasks)) == len(family.tasks)
    seen = {primitive for task in episodes.trained for primitive in family.tasks[task]}
    assert {primitive for task in episodes.held_out for primitive in family.tasks[task]} <= seen
    assert max(seen) < family.primitives
    task, examples = episodes.sample(3)
    assert task in episodes.trained
    again = Episodes.from_recipe(spec).sample(3)
    assert again[0] == task
    assert np.array_equal(again[1].tokens, examples.tokens)
    assert int(examples.tokens.max()) < family.vocabulary_size
    assert (examples.tokens[:, 0] == TASK).all()
    assert (examples.tokens == TASK).sum() == EXAMPLES * (2 if name == "classification" else 1)
    few, more = episodes.support(task, 2), episodes.support(task, 5)
    assert np.array_equal(more.tokens[:2], few.tokens), "more examples begin with the fewer"
    longest = max(int((episodes.queries(task, 200).targets != IGNORED).sum(1).max()) for task in episodes.trained)
    assert longest == most_answers(name, LENGTHS[name]), "what `trireme plan` counts with"
    answers: dict[bytes, set[bytes]] = {}
    for task in episodes.trained:
        drawn = family.examples(task, 40, np.random.Generator(np.random.SFC64(1)))
        for tokens, targets in zip(drawn.tokens, drawn.targets, strict=True):
            prompt = tokens[: int(np.flatnonzero(targets != IGNORED)[0]) + 1]
            answers.setdefault(prompt.tobytes(), set()).add(targets[targets != IGNORED].tobytes())
    assert max(len(found) for found in answers.values()) >= 2, "no prompt tells its answer"


def test_transductions_and_walks_do_what_they_say() -> None:
    walk = FAMILIES["path-finding"](12)
    side = walk.side  # type: ignore[attr-defined]
    random = np.random.Generator(np.random.SFC64(1))
    for task, (goal_row, goal_column) in enumerate(walk.tasks):
        prompt, path = walk.draw(task, random)
        row, column = prompt[1] - 8, prompt[2] - 8
        for move in path[:-1]:
            row += {4: -1, 5: 1}.get(move, 0)
            column += {6: -1, 7: 1}.get(move, 0)
        assert (row, column + side) == (goal_row, goal_column)
    change = FAMILIES["transduction"](13)
    prompt, answer = change.draw(change.tasks.index((1, 8 + 3)), random)
    assert answer == [4 + (symbol - 4 + 3) % 8 for symbol in prompt[1:-1]][::-1]


def learned(world: World, steps: int = 120) -> tuple[FewShot, LanguageModel]:
    made, model, _ = objective(world, tasks="path-finding", micro=4 * EXAMPLES, innerSteps=2, adaptationSteps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with made.batches(0, 1, False) as batches:
        for step in range(steps):
            parts = batches.micro_batches(step)
            valid = torch.tensor(float(sum(int((part.targets != IGNORED).sum()) for part in parts)))
            for part in parts:
                made.learn(model, part, valid, None, lambda: None)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return made, model


def test_the_embedding_is_what_tells_tasks_apart(world: World) -> None:
    """After a short training: fitted to four examples a task is known far better than without, and another task's
    embedding does harm."""
    made, model = learned(world)
    samples = made.samples
    fitted = {}
    for task in samples.trained[::4][:6]:
        tokens, targets = joined([samples.support(task, 6)])
        fitted[task] = adapt(model, tokens, targets, torch.zeros(1, 16), steps=10, learning_rate=1.0)[0]

    def loss(of: dict[int, Tensor]) -> float:
        total = 0.0
        for task, z in of.items():
            tokens, targets = joined([samples.queries(task, 20)])
            with torch.no_grad():
                total += float(answer_losses(model, tokens, targets, z.expand(20, -1)).mean())
        return total / len(of)

    names = list(fitted)
    swapped = {task: fitted[other] for task, other in zip(names, names[1:] + names[:1], strict=True)}
    right, wrong, without = loss(fitted), loss(swapped), loss(dict.fromkeys(names, torch.zeros(16)))
    assert right < 0.8 * without
    assert wrong > 1.5 * right
    told = made.evaluate(model, lambda: None)
    assert told["accuracy"][1] > told["accuracy"][0]


def test_a_job_trains_alike_on_two_ranks_and_resumes(tmp_path: Path) -> None:
    """Through the trainer's own entry point: one rank in one go; two ranks, one of them with padding, then one more."""
    recipe = make(steps=6, micro=2 * EXAMPLES, evaluateEvery=3, embedding="compositional", outerGrad="final")
    recipe["batch"]["tokens"] = 3 * EXAMPLES * LENGTH
    recipe["schedule"] = {"warmupTokens": 0, "decayTokens": 6 * recipe["batch"]["tokens"]}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = Gang(tmp_path / "one", recipe, every=100).run()
    half = Gang(tmp_path / "two", {**recipe, "until": {"steps": 4}}, world=2, every=4).run()
    rest = Gang(tmp_path / "two", recipe, attempt=2, every=100).run()
    losses = {**half.losses(), **rest.losses()}
    assert max(abs(losses[step] - loss) for step, loss in one.losses().items()) < 1e-5
    told, again = one.events("evaluation"), rest.events("evaluation")
    assert [event["step"] for event in told] == [3, 6]
    assert again[-1]["answerLoss"] == pytest.approx(told[-1]["answerLoss"], abs=1e-4)
    assert torch.isfinite(torch.tensor(told[-1]["answerLoss"])).all()
    # The command measures the same of the checkpoint, embeddings of primitives included.
    root = tmp_path / "one" / "checkpoints"
    figures = evaluated(root, "--json")
    assert (figures["step"], figures["shots"]) == (6, [0, 4])
    assert figures["answerLoss"] == pytest.approx(told[-1]["answerLoss"], abs=1e-5)
    assert figures["accuracy"] == pytest.approx(told[-1]["accuracy"], abs=1e-5)
    more = evaluated(root, "--shots", "0", "--shots", "2", "--draws", "3", "--limit", "7", "--json")
    assert more["shots"] == [0, 2]
    assert more["answerLoss"][0] == pytest.approx(evaluated(root, "--limit", "7", "--json")["answerLoss"][0], abs=1e-5)
    assert "unseen tasks, 4 examples" in CliRunner().invoke(evaluate, [str(root)]).output
    refused = CliRunner().invoke(evaluate, [str(root), "--seed", "2"])
    assert (refused.exit_code, "--seed is of --data" in refused.output) == (2, True)


def evaluated(root: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(evaluate, [str(root), *options])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))
