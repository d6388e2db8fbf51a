"""NormFormer (2110.09456): where its additions stand and that they are nothing more."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn
from trireme_api.families import PRESETS, resolve
from trireme_api.families.normformer import NormFormerBlocks
from trireme_api.recipe import ModelSpec
from trireme_api.schema import InvalidSpec
from trireme_trainer import families
from trireme_trainer.families.convert import ConversionError, config_to_hugging_face
from trireme_trainer.families.normformer import normformer_block
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.init import full_value

ADDITIONS = {"postAttentionNorm": False, "headScale": "none", "innerNorm": False, "residualScale": False}


def make(seed: int = 1, **overrides: int | float | bool | str) -> families.LanguageModel:
    quiet = {"dropout": 0.0, "attentionDropout": 0.0}
    config = resolve(ModelSpec(preset="normformer-tiny", overrides={**quiet, **overrides}))
    return initialise(families.build(config), seed)


def initialise(model: families.LanguageModel, seed: int = 1) -> families.LanguageModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(full_value(name, tuple(weight.shape), model.initial_value(name), seed))
    return model


def tokens(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(5))


def test_without_additions_it_is_the_baseline() -> None:
    plain = resolve(ModelSpec(preset="gpt-tiny", overrides={"dropout": 0.0, "attentionDropout": 0.0}))
    ours, baseline = make(**ADDITIONS), initialise(families.build(plain))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in baseline.named_parameters()]
    assert torch.equal(ours(tokens()), baseline(tokens()))


@pytest.mark.parametrize("form", ["paper", "code"])
def test_with_its_additions_at_identity_it_is_the_baseline_bit_by_bit(form: str) -> None:
    ours, baseline = make(headScale=form), make(**ADDITIONS)
    for block in ours.blocks:
        assert bool((block.attention.head_scale == 1).all())
        assert bool((block.residual_scale == 1).all())
        block.post_attention_norm = nn.Identity()
        block.feed_forward.inner_norm = nn.Identity()
    assert torch.equal(ours(tokens()), baseline(tokens()))


@pytest.mark.parametrize(
    ("addition", "value"),
    [("postAttentionNorm", True), ("innerNorm", True), ("residualScale", True), ("headScale", "paper")],
)
def test_each_addition_alone_has_just_its_parameters(addition: str, value: bool | str) -> None:
    names = {name for name, _ in make(**{**ADDITIONS, addition: value}).blocks[0].named_parameters()}
    names -= {name for name, _ in make(**ADDITIONS).blocks[0].named_parameters()}
    norms = {"postAttentionNorm": "post_attention_norm", "innerNorm": "feed_forward.inner_norm"}
    if addition in norms:
        assert names == {f"{norms[addition]}.weight", f"{norms[addition]}.bias"}
    else:
        assert names == {{"residualScale": "residual_scale", "headScale": "attention.head_scale"}[addition]}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_the_block_is_the_papers_equations(causal: bool) -> None:
    """Written out: x + LN(Concat(γ_h head_h) W_O), then λ ⊙ x + fc2(LN(gelu(fc1(LN(x)))))."""
    config = PRESETS["normformer-tiny" if causal else "normformer-masked-tiny"].config
    assert isinstance(config, NormFormerBlocks)
    torch.manual_seed(3)
    block = normformer_block(config).eval()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, mean=float("norm.weight" in name or "scale" in name), std=0.2)
    x = torch.randn(2, 6, 64)
    a = block.attention
    n = nn.functional.layer_norm(x, (64,), block.attention_norm.weight, block.attention_norm.bias)
    q, k, v = (p(n).view(2, 6, 2, 32) for p in (a.q_proj, a.k_proj, a.v_proj))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 32**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
    heads = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v) * a.head_scale.view(1, 1, 2, 1)
    x1 = x + block.post_attention_norm(heads.flatten(2) @ a.out_proj.weight.T + a.out_proj.bias)
    f = block.feed_forward
    inner = f.inner_norm(nn.functional.gelu(f.fc1(block.feed_forward_norm(x1))))
    assert inner.shape == (2, 6, 256)
    torch.testing.assert_close(block(x), block.residual_scale * x1 + f.fc2(inner), rtol=1e-5, atol=1e-5)
    changed = x.clone()
    changed[:, -1] += 1
    assert torch.equal(block(changed)[:, 0], block(x)[:, 0]) == causal


def test_the_two_forms_of_head_scale_are_one_at_first_and_two_afterwards() -> None:
    paper, code = make(headScale="paper"), make(headScale="code")
    assert torch.equal(paper(tokens()), code(tokens()))
    for model in (paper, code):
        for block in model.blocks:
            nn.init.constant_(block.attention.head_scale, 1.0)
            with torch.no_grad():
                block.attention.head_scale[0] = 3.0
    assert (paper(tokens()) - code(tokens())).abs().max() > 1e-3
    attention, x = code.blocks[0].attention, torch.randn(1, 5, 64)
    scaled = attention(x)
    with torch.no_grad():
        attention.head_scale.fill_(1.0)
        plain = attention(x)
    torch.testing.assert_close(scaled, torch.cat([3 * plain[..., :32], plain[..., 32:]], dim=-1))


def test_additions_without_pre_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="pre-LN"):
        TransformerBlock(64, nn.Identity(), nn.Identity(), dropout=0.0, pre_norm=False, residual_scale=True)


def test_transformers_has_none_to_convert_to() -> None:
    for name in ("normformer-tiny", "normformer-masked-tiny"):
        with pytest.raises(ConversionError, match=r"^normformer.*: Transformers has no model of this family"):
            config_to_hugging_face(PRESETS[name].config)


def test_bad_head_scale_is_one_clear_line() -> None:
    with pytest.raises(InvalidSpec, match=r"model\.overrides\.headScale"):
        resolve(ModelSpec(preset="normformer-tiny", overrides={"headScale": "half"}))
