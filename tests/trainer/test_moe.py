"""The top-2 gate and the mixture of experts against a reading of the rules token by token."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math

import pytest
import torch
from torch import Tensor, nn
from trireme_api.families import PRESETS, check_recipe
from trireme_api.families.moe import MoeConfig
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec
from trireme_trainer import families
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.layers.experts import MixtureOfExperts
from trireme_trainer.layers.routing import top_2

TOKENS, EXPERTS, WIDTH, INNER = 23, 4, 8, 12


def _mixture(**changes: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "capacity": "limited", "capacity_factor": 2.0, "evaluation_capacity": 1.0, "balance_weight": 0.0,
        "gradient_scale": 1.0, **changes,
    }  # fmt: skip
    mixture = MixtureOfExperts(WIDTH, INNER, EXPERTS, "gelu", **settings)  # type: ignore[arg-type]
    for weight in mixture.parameters():
        nn.init.normal_(weight, std=0.5)
    return mixture


def _hidden(seed: int = 1) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _by_hand(mixture: MixtureOfExperts, hidden: Tensor, capacity: float) -> tuple[Tensor, float, int]:
    """(output, balance loss, dropped choices), one token at a time, as the paper's gate is described."""
    x = hidden[0]
    probabilities = (x @ mixture.gate.weight.T).softmax(dim=1)
    choices = [[int(i) for i in row.argsort(descending=True)[:2]] for row in probabilities]
    taken = [0] * EXPERTS
    kept: list[list[bool]] = [[False, False] for _ in choices]
    for k in (0, 1):
        for token, chosen in enumerate(choices):
            kept[token][k] = taken[chosen[k]] < capacity
            taken[chosen[k]] += 1
    e = mixture.experts
    out = torch.zeros_like(x)
    for token, chosen in enumerate(choices):
        alive = [(i, probabilities[token, i]) for i, there in zip(chosen, kept[token], strict=True) if there]
        for i, p in alive:
            inner = nn.functional.gelu(e.fc1_weight[i] @ x[token] + e.fc1_bias[i])
            out[token] = out[token] + p / sum(q for _, q in alive) * (e.fc2_weight[i] @ inner + e.fc2_bias[i])
    first = torch.tensor([chosen[0] for chosen in choices])
    share = torch.bincount(first, minlength=EXPERTS) / len(first)
    balance = EXPERTS**2 * (probabilities.mean(dim=0) * share).mean()
    return out[None], balance.item(), sum(not there for row in kept for there in row)


@pytest.mark.parametrize("factor", [0.4, 1.0, 4.0])
def test_a_mixture_is_what_the_rules_say_token_by_token(factor: float) -> None:
    mixture = _mixture(capacity_factor=factor).train()
    capacity = int(factor * math.ceil(TOKENS / EXPERTS))
    expected, balance, dropped = _by_hand(mixture, _hidden(), capacity)
    assert mixture.slots(TOKENS) == capacity
    assert (dropped > 0) == (factor < 4.0)
    out = mixture(_hidden())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert mixture.figures["balanceLoss"].item() == pytest.approx(balance, rel=1e-5)
    assert mixture.figures["expertOverflow"].item() == pytest.approx(dropped / (2 * TOKENS))


def test_gradients_are_those_of_the_rules() -> None:
    mixture = _mixture(capacity_factor=1.0).train()
    by_hand = _by_hand(mixture, _hidden(), math.ceil(TOKENS / EXPERTS))[0]
    expected = torch.autograd.grad(by_hand.square().sum(), list(mixture.parameters()))
    mixture(_hidden()).square().sum().backward()
    for (name, weight), wanted in zip(mixture.named_parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_dropless_drops_nothing_and_equals_unlimited_capacity() -> None:
    dropless, roomy = _mixture(capacity="dropless").train(), _mixture(capacity_factor=100.0).train()
    for out in (dropless(_hidden()), roomy(_hidden())):
        out.square().sum().backward()
    torch.testing.assert_close(dropless(_hidden()), roomy(_hidden()), rtol=1e-5, atol=1e-5)
    assert dropless.figures["expertOverflow"].item() == 0.0
    for ours, theirs in zip(dropless.parameters(), roomy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = torch.eye(EXPERTS).repeat(8, 1) * 30.0
    assert top_2(even, 100).balance.item() == pytest.approx(1.0, abs=1e-5)
    one = torch.tensor([[30.0, 0.0, 0.0, 0.0]]).repeat(32, 1)
    assert top_2(one, 100).balance.item() == pytest.approx(EXPERTS, abs=1e-5)


def test_second_choices_queue_after_all_first_ones() -> None:
    """Token 0 has expert 1 second, token 1 has it first: with one place the later token gets it."""
    routing = top_2(torch.tensor([[3.0, 2.0, 0.0, 0.0], [0.0, 3.0, 2.0, 0.0]]), capacity=1)
    assert routing.expert.tolist() == [[0, 1], [1, 2]]
    assert routing.kept.tolist() == [[True, False], [True, True]]
    assert routing.weight[0].tolist() == [1.0, 0.0]
    assert routing.weight[1].sum().item() == pytest.approx(1.0)


def test_a_token_whose_choices_are_both_dropped_keeps_only_its_residual() -> None:
    same = torch.tensor([[3.0, 2.0, 0.0, 0.0]]).repeat(3, 1)
    routing = top_2(same, capacity=1)
    assert routing.kept.tolist() == [[True, True], [False, False], [False, False]]
    assert routing.weight[1].tolist() == [0.0, 0.0]


def test_the_balance_loss_reaches_the_gate_by_its_weight_and_the_micro_batches_share() -> None:
    def gate_gradient(weight: float, share: float) -> Tensor:
        mixture = _mixture(balance_weight=weight).train()
        set_share(mixture, torch.tensor(share))
        (mixture(_hidden()) * 0.0).sum().backward()
        assert mixture.gate.weight.grad is not None
        return mixture.gate.weight.grad

    assert not gate_gradient(0.0, 1.0).any()
    whole, half = gate_gradient(0.5, 1.0), gate_gradient(0.5, 0.5)
    mixture = _mixture().train()
    logits = _hidden()[0] @ mixture.gate.weight.T
    (expected,) = torch.autograd.grad(0.5 * top_2(logits, 100).balance, [mixture.gate.weight])
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(half, expected / 2)


def test_expert_gradients_are_scaled_and_nothing_else() -> None:
    plain, scaled = _mixture(), _mixture(gradient_scale=2.0)
    for mixture in (plain, scaled):
        mixture.train()(_hidden()).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 2.0 if name.startswith("experts.") else 1.0
        torch.testing.assert_close(other.grad, one.grad * factor, msg=name)


def test_evaluation_does_not_depend_on_the_batch() -> None:
    mixture = _mixture().eval()
    with torch.no_grad():
        whole = mixture(_hidden())
        alone = torch.cat([mixture(_hidden()[:, t : t + 1]) for t in range(TOKENS)], dim=1)
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


def test_figures_tell_load_and_entropy() -> None:
    mixture = _mixture()
    nn.init.zeros_(mixture.gate.weight)
    mixture.train()(_hidden())
    # All equal: the gate knows nothing, and ties all fall to the same two experts.
    assert mixture.figures["gateEntropy"].item() == pytest.approx(math.log(EXPERTS))
    assert mixture.figures["expertLoad"].item() == pytest.approx(EXPERTS / 2)


def test_figures_of_a_model_are_means_over_its_mixtures() -> None:
    model = families.build(MoeConfig(layers=4, width=16, heads=2, experts=4, vocabulary_size=64, maximum_positions=32))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    model.train()(torch.randint(4, 64, (2, 16)))
    layers = [m.figures["gateEntropy"] for m in model.modules() if isinstance(m, MixtureOfExperts)]
    assert len(layers) == 2
    torch.testing.assert_close(model.figures()["gateEntropy"], torch.stack(layers).mean())


def test_blocks_with_experts_compile_as_one_graph() -> None:
    config = PRESETS["moe-tiny"].config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    model = families.build(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    tokens = torch.randint(4, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = model.train()(tokens)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_dropless_is_not_compiled() -> None:
    recipe = {
        "model": {"preset": "moe-tiny", "overrides": {"capacity": "dropless"}},
        "data": {"sources": [{"path": "x"}], "sequenceLength": 32}, "batch": {"tokens": 32}, "until": {"steps": 1},
        "compile": True,
    }  # fmt: skip
    with pytest.raises(InvalidSpec, match=r"compile: .*dropless"):
        check_recipe(Recipe.model_validate(recipe))
