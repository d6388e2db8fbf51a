"""What every family owes: exact counts, an initial value for each parameter, and a name nobody else has."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math

import pytest
import torch
from torch import Tensor, nn
from trireme_api.families import PRESETS
from trireme_trainer import families
from trireme_trainer.layers.init import Constant, Normal, Uniform, full_value

TINY = sorted(name for name in PRESETS if name.endswith("-tiny"))
CAUSAL = [name for name in TINY if getattr(PRESETS[name].config, "causal", True)]


def _meta(name: str) -> families.LanguageModel:
    with torch.device("meta"):
        return families.build(PRESETS[name].config)


def initialised(name: str, seed: int = 1) -> families.LanguageModel:
    model = _meta(name).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            weight.copy_(full_value(parameter, tuple(weight.shape), model.initial_value(parameter), seed))
    return model


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_has_exactly_the_stated_parameters(name: str) -> None:
    config, model = PRESETS[name].config, _meta(name)
    assert sum(weight.numel() for weight in model.parameters()) == config.parameters().total
    for part in model.parts():
        assert len(part.blocks) == config.layers
        largest = max(sum(weight.numel() for weight in block.parameters()) for block in part.blocks)
        assert largest == config.block_parameters()
    trained = sum(weight.numel() for part in model.trained() for weight in part.parameters())
    assert trained == config.trained_parameters


def assert_spread(weight: Tensor, std: float, parameter: str) -> None:
    """Five deviations of the standard deviation of n normal values (uniform ones vary less): 5 % of 5,000 values, all
    that can be said of a hundred is 35 %."""
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), parameter


@pytest.mark.parametrize("name", TINY)
def test_each_parameter_starts_as_its_rule_says(name: str) -> None:
    model = initialised(name)
    for parameter, weight in model.named_parameters():
        match model.initial_value(parameter):
            case Constant(value):
                assert (weight == value).all(), parameter
            case Uniform(bound):
                assert weight.abs().max() <= bound, parameter
                assert_spread(weight, bound / math.sqrt(3), parameter)
            case Normal(std, zero_row):
                rows = [row for row in range(len(weight)) if row != zero_row]
                assert_spread(weight[rows], std, parameter)
                if zero_row is not None:
                    assert not weight[zero_row].any(), parameter


@pytest.mark.parametrize("name", TINY)
def test_a_name_that_is_no_parameter_has_no_initial_value(name: str) -> None:
    with pytest.raises(KeyError, match="no parameter named"):
        _meta(name).initial_value("blocks.0.attention.no_such.weight")


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_what_follows_it(name: str) -> None:
    model = initialised(name)
    tokens = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(7))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 500
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before - after)[:, 20:].abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("name", sorted(set(TINY) - set(CAUSAL)))
def test_others_see_both_sides(name: str) -> None:
    model = initialised(name)
    tokens = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(7))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 500
    with torch.no_grad():
        assert (model(tokens) - model(changed)).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("name", TINY)
def test_padding_changes_nothing_for_real_tokens(name: str) -> None:
    model = initialised(name)
    tokens = torch.randint(4, 500, (1, 20), generator=torch.Generator().manual_seed(7))
    padded = torch.cat([torch.full((1, 5), 1), tokens], dim=1)
    mask = (torch.arange(25) >= 5).long()[None]
    with torch.no_grad():
        ours, alone = model(padded, mask_BT=mask), model(tokens)
    assert ours.isfinite().all()
    assert (ours[:, 5:] - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("name", TINY)
def test_the_head_gets_what_is_projected(name: str) -> None:
    model = initialised(name)
    tokens = torch.randint(4, 500, (2, 12), generator=torch.Generator().manual_seed(7))

    def in_parts(hidden: Tensor, project: families.Project) -> Tensor:
        return torch.cat([project(part) for part in hidden.split(5, dim=1)], dim=1)

    with torch.no_grad():
        torch.testing.assert_close(model(tokens, in_parts), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_few_steps_of_training_lower_the_loss(name: str) -> None:
    model = initialised(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokens = torch.randint(4, 500, (2, 32), generator=torch.Generator().manual_seed(7))
    losses = []
    for step in range(10):
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_building_an_unknown_family_is_an_error() -> None:
    with pytest.raises(TypeError, match="no family builds int"):
        families.build(3)
