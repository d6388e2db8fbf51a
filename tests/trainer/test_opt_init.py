"""Initial values: the paper's distributions, and a function of (seed, name) alone."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trireme_api.families import PRESETS
from trireme_trainer import families
from trireme_trainer.layers import init
from trireme_trainer.layers.init import Constant, InitialValue, Normal, full_value, value_rows


def _model(name: str) -> families.LanguageModel:
    with torch.device("meta"):
        return families.build(PRESETS[name].config)


@pytest.mark.parametrize("preset", ["opt-8m", "opt-350m"])
def test_distributions_are_the_papers(preset: str) -> None:
    model = _model(preset)
    layers = model.config.layers
    checked = set()
    for name, weight in model.named_parameters():
        kind = ".".join(name.split(".")[-2:]) if "norm" not in name else "norm." + name.rpartition(".")[2]
        if kind in checked:
            continue
        checked.add(kind)
        value = full_value(name, tuple(weight.shape), model.initial_value(name), seed=1)
        if kind.endswith("bias"):
            assert not value.any()
        elif kind == "norm.weight":
            assert (value == 1).all()
        else:
            narrow = kind in ("out_proj.weight", "fc2.weight")
            std = 0.006 / math.sqrt(2 * layers) if narrow else 0.006
            # Four standard errors of a sample standard deviation and of a mean.
            assert value.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * value.numel()) + 1e-3)
            assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel())
            kurtosis = (value / std).pow(4).mean().item()
            assert kurtosis == pytest.approx(3, rel=0.1)
    wanted = {"embed_tokens.weight", "embed_positions.weight", "q_proj.weight", "out_proj.weight", "fc1.weight"}
    assert checked >= wanted | {"fc2.weight", "fc2.bias", "norm.weight", "norm.bias"}
    assert ("project_in.weight" in checked) == (preset == "opt-350m")


def test_padding_rows_are_zero_and_no_other_is() -> None:
    model = _model("opt-tiny")
    for name in ("embed_tokens.weight", "embed_positions.weight"):
        shape = tuple(model.get_parameter(name).shape)
        value = full_value(name, shape, model.initial_value(name), seed=1)
        zero_rows = (value == 0).all(dim=1).nonzero().flatten().tolist()
        assert zero_rows == [1]


def test_every_parameter_of_every_size_has_a_rule_and_nothing_else_has() -> None:
    for preset in PRESETS:
        model = _model(preset)
        for name, _ in model.named_parameters():
            assert isinstance(model.initial_value(name), InitialValue)
    with pytest.raises(KeyError, match="nonsense"):
        model.initial_value("blocks.0.nonsense.weight")


NAME, RULE = "blocks.0.feed_forward.fc1.weight", Normal(0.006)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    block=st.integers(1, 64),
)
def test_any_partition_of_rows_makes_the_same_tensor(rows: int, columns: int, cuts: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "BLOCK_ELEMENTS", block)
        rule = Normal(0.006, zero_row=rows // 2)
        whole = full_value(NAME, (rows, columns), rule, 1)
        bounds = sorted({0, rows, *(cut for cut in cuts if cut <= rows)})
        parts = [value_rows(NAME, (rows, columns), rule, 1, a, b) for a, b in itertools.pairwise(bounds)]
        assert torch.equal(torch.cat(parts), whole)
        assert not whole[rows // 2].any()


def test_rows_of_the_largest_model_come_without_the_tensor() -> None:
    """175B's token table has 6.2e8 values; its last 3 rows touch one block only."""
    model = _model("opt-175b")
    name = "embed_tokens.weight"
    shape = tuple(model.get_parameter(name).shape)
    drawn = []
    real = init._generator

    def counting(seed: int, key: str, block: int) -> object:
        drawn.append(block)
        return real(seed, key, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "_generator", counting)
        rows = value_rows(name, shape, model.initial_value(name), 1, shape[0] - 3, shape[0])
    assert rows.shape == (3, 12288)
    assert len(drawn) == 1
    assert rows.std().item() == pytest.approx(0.006, rel=0.03)


def test_seed_and_name_both_matter_and_blocks_differ() -> None:
    shape = (init.BLOCK_ELEMENTS // 64 * 2, 64)
    value = full_value(NAME, shape, RULE, 1)
    first, second = value.chunk(2)
    others = [full_value(NAME, shape, RULE, 2), full_value("blocks.1.feed_forward.fc1.weight", shape, RULE, 1)]
    for other in (*(o[: len(first)] for o in others), second):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1].item()) < 5e-3
    # 32 bits of seed would make these two equal.
    assert not torch.equal(full_value(NAME, (8, 8), RULE, 5), full_value(NAME, (8, 8), RULE, 2**32 + 5))


def test_values_are_the_same_in_another_process_and_whatever_was_drawn_before() -> None:
    torch.manual_seed(123)
    torch.randn(1000)
    here = full_value(NAME, (300, 70), RULE, 9)
    code = (
        "import torch; from trireme_trainer.layers.init import *; "
        f"print(full_value({NAME!r}, (300, 70), Normal(0.006), 9).double().mul(2.0**40).sum().item())"
    )
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(there) == here.double().mul(2.0**40).sum().item()


def test_values_are_pinned() -> None:
    """A model of a seed is the same model next year: changing this changes every initial value."""
    value = full_value(NAME, (4, 3), Normal(1.0), 1)
    pinned = [0.0628013089, 1.9236198664, 0.3112929165, 1.6999634504]
    assert value.flatten()[:4].tolist() == pytest.approx(pinned, abs=1e-6)


def test_dtype_scalars_and_vectors() -> None:
    exact = full_value(NAME, (64, 8), RULE, 1)
    assert torch.equal(full_value(NAME, (64, 8), RULE, 1, torch.bfloat16), exact.bfloat16())
    assert full_value("scale", (), Constant(2.0), 1).item() == 2.0
    assert full_value("scale", (), Normal(1.0), 1).shape == ()
    assert torch.equal(
        torch.cat([value_rows("bias", (10,), RULE, 1, 0, 4), value_rows("bias", (10,), RULE, 1, 4, 10)]),
        full_value("bias", (10,), RULE, 1),
    )


def test_an_empty_shard_is_empty() -> None:
    assert value_rows(NAME, (5, 4), RULE, 1, 5, 5).shape == (0, 4)


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 6)])
def test_rows_outside_the_tensor_are_an_error(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not lie within the 5 rows"):
        value_rows(NAME, (5, 4), RULE, 1, *bounds)
