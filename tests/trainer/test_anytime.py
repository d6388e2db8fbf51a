"""Anytime learning (ALMA): golden sums, a stream that partitions its data, replay counted, growth that changes nothing
but capacity and takes the optimiser's state along."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trireme_trainer.anytime.growth import Branch, Mixture, grow, mixtures, most_used
from trireme_trainer.anytime.learners import Ensemble, GrowingEnsemble, GrowingMixture, Learner, Single, generator
from trireme_trainer.anytime.loop import run
from trireme_trainer.anytime.metrics import Course, Moment, count_parameters, forward_flops
from trireme_trainer.anytime.networks import perceptron
from trireme_trainer.anytime.session import Data, Fit, nats, wrong_answers
from trireme_trainer.anytime.stream import Plan, Session, cut, stream

FIT = Fit(epochs=3, batch=16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def points(samples: int, seed: int) -> Data:
    """Three classes of points, learnable and not trivial: [samples, 6]."""
    random = generator(seed)
    labels = torch.randint(3, (samples,), generator=random)
    means = torch.eye(6)[:3] * 2
    return Data(means[labels] + torch.randn(samples, 6, generator=random), labels)


def small(grows: bool = False) -> Any:
    return lambda random: perceptron(6, 5, 3, random, grows=grows)


LEARNERS: dict[str, Any] = {
    "single": lambda: Single(small(), FIT, 1),
    "ensemble": lambda: Ensemble(small(), FIT, 1, members=3),
    "growing ensemble": lambda: GrowingEnsemble(small(), FIT, 1),
    "growing mixture": lambda: GrowingMixture(small(grows=True), FIT, 1),
}


# -- the stream --------------------------------------------------------------------------------------------------------


def test_mega_batches_partition_the_data_as_the_released_code_does() -> None:
    np.random.seed(432)
    expected = np.array_split(np.random.permutation(103), 10)
    parts = cut(103, 10)
    assert [len(part) for part in parts] == [11] * 3 + [10] * 7
    assert all((a == b).all() for a, b in zip(parts, expected, strict=True))
    assert sorted(np.concatenate(parts)) == list(range(103))


@pytest.mark.parametrize(("wait", "trained"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5])])
def test_waiting(wait: int, trained: list[int]) -> None:
    items = list(stream(50, Plan(5, wait)))
    assert [t for t, item in enumerate(items, 1) if item is not None] == trained
    sessions = [item for item in items if item is not None]
    assert [session.number for session in sessions] == list(range(1, len(trained) + 1))
    assert sorted(np.concatenate([np.concatenate([s.train, s.validation]) for s in sessions])) == list(range(50))


def test_validation_rows_do_not_depend_on_waiting() -> None:
    def held(wait: int) -> set[int]:
        return {int(row) for item in stream(50, Plan(5, wait), seed=7) if item for row in item.validation}

    assert held(1) == held(2) == held(5)
    assert len(held(1)) == 5


@pytest.mark.parametrize(("share", "replayed"), [(0.0, [0, 0, 0]), (0.5, [0, 14, 27]), (1.0, [0, 27, 54])])
def test_replay_counts(share: float, replayed: list[int]) -> None:
    sessions = [item for item in stream(90, Plan(3, replay=share)) if item is not None]
    assert [session.replayed for session in sessions] == replayed
    assert [len(session.train) for session in sessions] == [27 + more for more in replayed]
    held = set(np.concatenate([session.validation for session in sessions]).tolist())
    for number, session in enumerate(sessions):
        assert len(set(session.train)) == len(session.train)
        assert not held & set(session.train.tolist())
        arrived = np.concatenate(cut(90, 3)[: number + 1])
        assert set(session.train.tolist()) <= set(arrived.tolist())


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda: Plan(0), "mega_batches"), (lambda: Plan(5, wait=6), "wait"), (lambda: Plan(5, replay=1.5), "replay"),
        (lambda: Plan(5, validation=0.0), "validation"), (lambda: cut(5, 3), "mega_batches"),
        (lambda: Ensemble(small(), FIT, 1, members=0), "members"), (lambda: GrowingMixture(small(), FIT, 1), "make"),
        (lambda: GrowingMixture(small(True), FIT, 1, every=0), "every"),
        (lambda: Mixture(nn.Linear(2, 2), 2).split((1,), generator(0)), "path"),
    ],
)  # fmt: skip
def test_bad_input_is_named(bad: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        bad()


# -- the metrics -------------------------------------------------------------------------------------------------------


def test_golden_sums() -> None:
    course = Course([Moment(9, 100, 0.0), Moment(6, 100, 500.0), Moment(3, 150, 250.0)], test_size=10)
    assert (course.errors, course.error_rate, course.final_error_rate) == (18, 0.6, 0.3)
    assert (course.memory, course.flops) == (350, 750.0)


class Constant:
    parameters = 7

    def train(self, number: int, train: Data, validation: Data) -> float:
        return 0.0

    def scores(self, inputs: Tensor) -> Tensor:
        return F.one_hot(torch.zeros(len(inputs), dtype=torch.long), 3).float()


def test_a_constant_learner_errs_alike_after_each_mega_batch() -> None:
    data, test = points(60, 1), points(40, 2)
    course = run(Constant(), data, test, Plan(4), FIT)
    wrong = int((test.targets != 0).sum())
    assert wrong > 0
    assert course.errors == 4 * wrong
    assert course.memory == 28


def test_errors_of_language_models_are_nats() -> None:
    scores, targets = torch.randn(2, 5, 7, generator=generator(1)), torch.arange(10).reshape(2, 5) % 7
    by_hand = -sum(scores[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(5))
    assert nats(scores, targets) == pytest.approx(float(by_hand), rel=1e-6)
    assert wrong_answers(scores, scores.argmax(-1)) == 0


def test_the_tardy_learner_serves_an_untrained_model_until_the_end() -> None:
    data, test = points(120, 1), points(60, 2)
    untrained = wrong_answers(Single(small(), FIT, 1).scores(test.inputs), test.targets)
    course = run(Single(small(), FIT, 1), data, test, Plan(6, wait=6), FIT)
    assert course.errors == 5 * untrained + course.moments[-1].errors
    assert [moment.flops for moment in course.moments[:-1]] == [0.0] * 5
    assert course.moments[-1].errors < untrained


@pytest.mark.parametrize(("width", "expected"), [(4, 3_210), (8, 6_442), (16, 13_002), (32, 26_506), (64, 55_050)])
def test_parameters_of_the_released_perceptron(width: int, expected: int) -> None:
    assert count_parameters(perceptron(784, width, 10, generator(0))) == expected


def test_flops_are_the_closed_form() -> None:
    def closed(experts: int) -> int:
        hidden = sum(experts * 2 * a * b for a, b in ((6, 5), (5, 5)))
        gates = (experts > 1) * sum(2 * a * experts for a in (6, 5))
        return hidden + gates + 2 * 5 * 3

    inputs = points(4, 1).inputs
    model = perceptron(6, 5, 3, generator(0), grows=True)
    assert forward_flops(model, inputs) == closed(1)
    grow(model, [inputs], generator(1))
    assert forward_flops(model, inputs) == closed(2)


# -- growth ------------------------------------------------------------------------------------------------------------


def trained_mixture(optimizer: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Data]:
    data = points(64, 3)
    model = perceptron(6, 5, 3, generator(0), grows=True)
    made = optimizer(model.parameters())
    for _ in range(3):
        step(model, made, data)
    return model, made, data


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(data.inputs), data.targets).backward()
    optimizer.step()


OPTIMIZERS = {
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=1.0),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_keeps_the_function_and_the_optimiser_state(name: str) -> None:
    model, optimizer, data = trained_mixture(OPTIMIZERS[name])
    for round_ in range(3):
        before, size = model(data.inputs).detach(), count_parameters(model)
        grow(model, [data.inputs], generator(round_), optimizer)
        assert float((model(data.inputs).detach() - before).abs().max()) <= 1e-6
        # A layer gains one expert and a gate of two: 6 → 5 and 5 → 5.
        assert count_parameters(model) - size == (6 * 5 + 5 + 2 * 6 + 2) + (5 * 5 + 5 + 2 * 5 + 2)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert len(held) == len(list(model.parameters()))
        step(model, optimizer, data)
        for parameter in model.parameters():
            for value in optimizer.state[parameter].values():
                assert not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape


def test_a_copy_takes_over_moments_and_then_goes_its_own_way() -> None:
    model, optimizer, data = trained_mixture(OPTIMIZERS["adamw"])
    grow(model, [data.inputs], generator(5), optimizer)
    branch = mixtures(model)["0"].tree
    assert isinstance(branch, Branch)
    pairs = list(zip(branch.experts[0].parameters(), branch.experts[1].parameters(), strict=True))
    for first, second in pairs:
        assert first is not second
        assert torch.equal(first, second)
        a, b = optimizer.state[first], optimizer.state[second]
        assert a["step"] == b["step"] == 3
        assert all(torch.equal(a[name], b[name]) for name in ("exp_avg", "exp_avg_sq"))
        assert a["exp_avg"] is not b["exp_avg"]
    assert not any(parameter in optimizer.state for parameter in branch.gate.parameters())
    for _ in range(5):
        step(model, optimizer, data)
    assert any(not torch.equal(first, second) for first, second in pairs)


def test_growth_without_its_gate_normalised_would_be_seen() -> None:
    """Negative control: the test above can fail."""
    model, _, data = trained_mixture(OPTIMIZERS["adamw"])
    before = model(data.inputs)
    grow(model, [data.inputs], generator(5))
    layer = mixtures(model)["0"].tree
    layer.shares = lambda x: layer.gate(x).sigmoid()  # type: ignore[union-attr, operator]
    assert float((model(data.inputs).detach() - before).abs().max()) > 1e-2


def test_the_most_used_expert_is_split() -> None:
    layer = Mixture(nn.Linear(4, 4), 4)
    layer.split((), generator(0))
    with torch.no_grad():
        layer.tree.gate.weight.zero_()  # type: ignore[union-attr, operator]
        layer.tree.gate.bias.copy_(torch.tensor([0.0, np.log(3.0)]))  # type: ignore[union-attr, operator]
    x = torch.randn(8, 4, generator=generator(1))
    assert layer.usage(x) == pytest.approx({(0,): 2.0, (1,): 6.0})
    model = nn.Sequential(layer)
    assert most_used(model, [x, x]) == {"0": (1,)}
    grow(model, [x], generator(2))
    assert layer.leaves() == [(0,), (1, 0), (1, 1)]
    assert sum(layer.usage(x).values()) == pytest.approx(8.0, abs=1e-5)


def test_growth_of_a_layer_that_sees_tokens() -> None:
    layer = Mixture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), 4)
    x_BTD = torch.randn(2, 3, 4, generator=generator(1))
    before = layer(x_BTD)
    layer.split((), generator(0), copies=3)
    assert float((layer(x_BTD) - before).detach().abs().max()) <= 1e-6
    assert sum(layer.usage(x_BTD).values()) == pytest.approx(6.0, abs=1e-5)


# -- the learners ------------------------------------------------------------------------------------------------------


def courses(plan: Plan) -> dict[str, Course]:
    data, test = points(120, 1), points(60, 2)
    return {name: run(make(), data, test, plan, FIT) for name, make in LEARNERS.items()}


def test_learners_and_what_they_cost() -> None:
    found = courses(Plan(4))
    sizes = {name: [moment.parameters for moment in course.moments] for name, course in found.items()}
    one = count_parameters(perceptron(6, 5, 3, generator(0)))
    assert sizes["single"] == [one] * 4
    assert sizes["ensemble"] == [3 * one] * 4
    assert sizes["growing ensemble"] == [one, 2 * one, 3 * one, 4 * one]
    more = (6 * 5 + 5 + 2 * 6 + 2) + (5 * 5 + 5 + 2 * 5 + 2)
    assert sizes["growing mixture"] == [one, one + more, one + 2 * more, one + 3 * more]
    flops = {name: [moment.flops for moment in course.moments] for name, course in found.items()}
    per_sample = 2 * (6 * 5 + 5 * 5 + 5 * 3)
    assert flops["single"] == [3 * 27 * per_sample] * 4
    assert flops["ensemble"] == [3 * 3 * 27 * per_sample] * 4
    assert flops["growing ensemble"] == flops["single"]
    assert all(more > less for less, more in itertools.pairwise(flops["growing mixture"]))
    for name, course in found.items():
        assert course.moments[-1].errors < course.moments[0].errors + 6, name


def test_full_replay_costs_as_much_more_as_there_is_past() -> None:
    course = courses(Plan(4, replay=1.0))["single"]
    flops = [moment.flops for moment in course.moments]
    assert flops == [flops[0] * t for t in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_gives_the_same_course(name: str) -> None:
    data, test = points(60, 1), points(40, 2)
    first, second = (run(LEARNERS[name](), data, test, Plan(3, replay=0.5), FIT) for _ in range(2))
    assert first == second


def test_members_of_an_ensemble_differ_and_a_grown_ensemble_keeps_the_old_ones() -> None:
    data = points(60, 1)
    sessions = [item for item in stream(60, Plan(2)) if isinstance(item, Session)]
    parts = [[data.rows(torch.from_numpy(r)) for r in (s.train, s.validation)] for s in sessions]
    growing = GrowingEnsemble(small(), FIT, 1)
    growing.train(1, *parts[0])
    kept = copy.deepcopy(growing.members[0].state_dict())
    growing.train(2, *parts[1])
    assert all(torch.equal(value, kept[key]) for key, value in growing.members[0].state_dict().items())
    assert not torch.equal(growing.members[0](data.inputs), growing.members[1](data.inputs))
    expected = (growing.members[0](data.inputs) + growing.members[1](data.inputs)) / 2
    assert torch.allclose(growing.scores(data.inputs), expected)
    fixed: Learner = Ensemble(small(), FIT, 1)
    likely = [member.scores(data.inputs).softmax(-1) for member in fixed.members]  # type: ignore[attr-defined]
    assert not torch.equal(likely[0], likely[1])
    assert torch.allclose(fixed.scores(data.inputs).exp(), sum(likely) / 3, atol=1e-6)


def test_a_session_ends_at_its_best_epoch() -> None:
    """Labels that mislead in training: validation is best at first, and patience ends the session."""
    right = points(60, 1)
    wrong = Data(right.inputs, (right.targets + 1) % 3)
    model = perceptron(6, 5, 3, generator(0))
    Fit(epochs=20, batch=16)(model, right, right, generator(1))
    seen = Fit(epochs=50, patience=4, batch=16)(model, wrong, right, generator(2))
    assert seen < 50 * 60
    worst = perceptron(6, 5, 3, generator(0))
    worst.load_state_dict(model.state_dict())
    Fit(epochs=20, batch=16)(worst, wrong, wrong, generator(2))
    assert wrong_answers(model(right.inputs), right.targets) < wrong_answers(worst(right.inputs), right.targets)
