"""Routers beside top-2 (its tests: test_moe.py): Switch's, HASH, BASE, one by one and in a mixture."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from trireme_trainer.layers.assignment import PRECISION, balanced_assignment
from trireme_trainer.layers.experts import MixtureOfExperts
from trireme_trainer.layers.routing import base, hashed, tell_tokens, top_1

TOKENS, EXPERTS, WIDTH = 24, 4, 8
RULES = ("top-2", "top-1", "hash", "base")


def _mixture(rule: str, **changes: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "capacity": "limited", "capacity_factor": 1.0, "evaluation_capacity": 1.0, "balance_weight": 0.0,
        "gradient_scale": 1.0, "router": rule, **changes,
    }  # fmt: skip
    mixture = MixtureOfExperts(WIDTH, 12, EXPERTS, "gelu", **settings)  # type: ignore[arg-type]
    for weight in mixture.parameters():
        nn.init.normal_(weight, std=0.5)
    tell_tokens(mixture, _tokens())
    return mixture


def _tokens() -> Tensor:
    return torch.randint(0, 500, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def _hidden(seed: int = 1) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _affinity(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Uneven: some experts are near to most tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + torch.randn(1, experts, generator=generator)


@pytest.mark.parametrize(("tokens", "experts"), [(64, 4), (60, 7), (32, 32), (5, 8), (9, 1)])
def test_a_balanced_assignment_is_even_and_next_to_the_best_there_is(tokens: int, experts: int) -> None:
    affinity = _affinity(tokens, experts)
    expert = balanced_assignment(affinity)
    load, places = torch.bincount(expert, minlength=experts), -(-tokens // experts)
    assert load.max() <= places
    if tokens % experts == 0:
        assert load.min() == places
    padded = torch.cat([affinity, torch.zeros(places * experts - tokens, experts)])
    copies = padded.repeat_interleave(places, dim=1).numpy()
    best = copies[linear_sum_assignment(copies, maximize=True)].sum()
    got = affinity.gather(1, expert[:, None]).sum().item()
    raise_ = (affinity.max() - affinity.min()).item() * 2 / PRECISION
    assert best - len(padded) * raise_ <= got <= best + 1e-4
    if tokens > experts > 1:
        greedy = torch.bincount(affinity.argmax(dim=1), minlength=experts)
        assert greedy.max() > places, "the nearest experts are balanced by chance: this shows nothing"


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_an_assignment_ends_and_is_even_whatever_it_is_given(value: float) -> None:
    affinity = torch.full((40, 4), value)
    assert torch.bincount(balanced_assignment(affinity)).tolist() == [10] * 4


def test_an_assignment_does_not_depend_on_the_order_of_tokens() -> None:
    affinity = _affinity(60, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(balanced_assignment(affinity)[order], balanced_assignment(affinity[order]))


def test_the_assignment_is_an_operation_as_torch_wants_them() -> None:
    torch.library.opcheck(balanced_assignment, (_affinity(12, 3),))


def test_base_is_balanced_in_training_and_takes_the_nearest_expert_at_evaluation() -> None:
    affinity = _affinity(40, 4)
    training, evaluation = base(affinity, 10, balanced=True), base(affinity, 40, balanced=False)
    assert torch.bincount(training.expert.flatten()).tolist() == [10] * 4
    assert training.kept.all()
    assert torch.equal(evaluation.expert[:, 0], affinity.argmax(dim=1))
    assert not torch.equal(training.expert, evaluation.expert)
    for routing in (training, evaluation):
        torch.testing.assert_close(routing.weight, affinity.gather(1, routing.expert).sigmoid())


def test_switch_weighs_by_the_probability_and_drops_what_comes_late() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    routing = top_1(logits, capacity=1)
    assert routing.expert.tolist() == [[0], [0], [1]]
    assert routing.kept.tolist() == [[True], [False], [True]]
    wanted = [[logits[0].softmax(0)[0].item()], [0.0], [logits[2].softmax(0)[1].item()]]
    torch.testing.assert_close(routing.weight, torch.tensor(wanted))
    assert routing.balance is not None


def test_a_hash_knows_nothing_but_the_token_and_spreads_the_vocabulary() -> None:
    vocabulary = torch.arange(50_000)
    routing = hashed(vocabulary, 64, 50_000)
    load = torch.bincount(routing.expert.flatten(), minlength=64) / (50_000 / 64)
    assert 0.85 < load.min() <= load.max() < 1.15
    # The rule is part of every checkpoint made with it.
    assert routing.expert[:8, 0].tolist() == [0, 39, 24, 5, 49, 18, 40, 51]
    assert torch.equal(hashed(vocabulary.flip(0), 64, 50_000).expert, routing.expert.flip(0))


def _by_hand(mixture: MixtureOfExperts, hidden: Tensor) -> Tensor:
    """Σ weight · expert(x), token by token, of an assignment that is taken as given."""
    routing, e = mixture.gate(hidden[0], mixture.slots(TOKENS)), mixture.experts
    out = []
    for x, experts, weights in zip(hidden[0], routing.expert, routing.weight, strict=True):
        parts = [
            w * (e.fc2_weight[i] @ nn.functional.gelu(e.fc1_weight[i] @ x + e.fc1_bias[i]) + e.fc2_bias[i])
            for i, w in zip(experts.tolist(), weights, strict=True)
        ]
        out.append(torch.stack(parts).sum(dim=0))
    return torch.stack(out)[None]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("capacity", ["limited", "dropless"])
def test_a_mixture_sends_tokens_where_its_router_says(rule: str, capacity: str) -> None:
    mixture = _mixture(rule, capacity=capacity, capacity_factor=4.0).train()
    torch.testing.assert_close(mixture(_hidden()), _by_hand(mixture, _hidden()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_router_learns_from(rule: str) -> None:
    """Its weight, where it has one, by the weights it gives; a hash has nothing to learn."""
    mixture = _mixture(rule).train()
    mixture(_hidden()).square().sum().backward()
    assert mixture.experts.fc1_weight.grad is not None
    if rule == "hash":
        assert mixture.gate.weight is None
    else:
        assert mixture.gate.weight.grad.abs().max() > 0
    assert ("balanceLoss" in mixture.figures) == (rule in ("top-1", "top-2"))


def test_base_drops_no_token_in_training() -> None:
    mixture = _mixture("base").train()
    mixture(_hidden())
    assert mixture.figures["expertOverflow"].item() == 0.0
    assert mixture.figures["expertLoad"].item() == pytest.approx(1.0)
    switch = _mixture("top-1").train()
    switch(_hidden())
    assert switch.figures["expertOverflow"].item() > 0.0


@pytest.mark.parametrize("rule", RULES)
def test_evaluation_of_every_rule_does_not_depend_on_the_batch(rule: str) -> None:
    mixture = _mixture(rule).eval()
    parts = []
    with torch.no_grad():
        whole = mixture(_hidden())
        for t in range(TOKENS):
            tell_tokens(mixture, _tokens()[:, t : t + 1])
            parts.append(mixture(_hidden()[:, t : t + 1]))
    torch.testing.assert_close(whole, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_the_hash_is_the_same_as_numpy_computes_it() -> None:
    """Written out in 32-bit integers that wrap: no device may see it otherwise."""
    numbers = np.arange(1000, dtype=np.uint32)
    for _ in range(2):
        numbers = (numbers ^ (numbers >> np.uint32(16))) * np.uint32(0x45D9F3B)
    numbers ^= numbers >> np.uint32(16)
    assert hashed(torch.arange(1000), 7, 1000).expert[:, 0].tolist() == (numbers % np.uint32(7)).tolist()
