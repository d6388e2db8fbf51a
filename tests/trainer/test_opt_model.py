"""The OPT module: its parameters, its logits against Transformers, padding, the head, compilation."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig as TheirConfig
from transformers import OPTForCausalLM
from trireme_api.families import PRESETS
from trireme_api.families.opt import OptConfig
from trireme_trainer import families
from trireme_trainer.families.convert import config_to_hugging_face, from_hugging_face
from trireme_trainer.layers.init import full_value

SMALL = {"vocabulary_size": 128, "maximum_positions": 64, "layers": 3, "width": 48, "heads": 4}
SHAPES = {
    "pre-norm": OptConfig(**SMALL),
    "post-norm-projected": OptConfig(**SMALL, pre_norm=False, embedding_width=24),
    "pre-norm-projected": OptConfig(**SMALL, embedding_width=80),
    "post-norm": OptConfig(**SMALL, pre_norm=False),
}
LENGTH = 40


def _meta(config: OptConfig) -> families.LanguageModel:
    with torch.device("meta"):
        return families.build(config)


def _theirs(config: OptConfig, seed: int = 0) -> OPTForCausalLM:
    """Transformers' model with every weight random: biases and norms too, and large enough that logits spread."""
    torch.manual_seed(seed)
    reference = OPTForCausalLM(TheirConfig(**config_to_hugging_face(config), attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return reference


def _pair(config: OptConfig) -> tuple[families.LanguageModel, OPTForCausalLM]:
    reference = _theirs(config)
    model = _meta(config)
    model.load_state_dict(from_hugging_face(config, reference.state_dict()), assign=True)
    return model.eval(), reference


def _tokens(rows: int, length: int = LENGTH) -> Tensor:
    return torch.randint(4, SMALL["vocabulary_size"], (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str) -> None:
    model, reference = _pair(SHAPES[shape])
    tokens = _tokens(3)
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_transformers(shape: str) -> None:
    model, reference = _pair(SHAPES[shape])
    tokens = _tokens(2)
    for logits in (model(tokens), reference(tokens).logits):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = {name: weight.grad for name, weight in reference.named_parameters()}
    expected = from_hugging_face(SHAPES[shape], theirs)
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_nothing_for_real_tokens(shape: str, side: str) -> None:
    model, reference = _pair(SHAPES[shape])
    tokens, pads = _tokens(2), 9
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    if side == "right":
        mask = mask.flip(1)
    padded = tokens.clone()
    padded[mask == 0] = 1
    with torch.no_grad():
        ours = model(padded, mask_BT=mask)
        theirs = reference(padded, attention_mask=mask).logits
        alone = model(padded[1:][mask[1:] == 1][None])
    assert ours.isfinite().all()
    assert (ours - theirs)[mask == 1].abs().max() <= 1e-5
    assert (ours[1][mask[1] == 1] - alone[0]).abs().max() <= 1e-5
    # What the pads hold does not matter either, so the mask is what keeps them out.
    padded[mask == 0] = 77
    with torch.no_grad():
        assert torch.equal(model(padded, mask_BT=mask)[mask == 1], ours[mask == 1])
        assert not torch.allclose(model(padded)[1], ours[1], atol=1e-3)


def test_no_token_sees_what_follows_it() -> None:
    model, _ = _pair(SHAPES["pre-norm"])
    tokens = _tokens(1)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 128
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before - after)[:, 20:].abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_head_gets_hidden_states_and_their_projection(shape: str) -> None:
    model, _ = _pair(SHAPES[shape])
    tokens = _tokens(2)

    def in_chunks(hidden: Tensor, project: families.Project) -> Tensor:
        assert hidden.shape == (2, LENGTH, SHAPES[shape].embedding_width)
        return torch.cat([project(part) for part in hidden.split(7, dim=1)], dim=1)

    with torch.no_grad():
        torch.testing.assert_close(model(tokens, in_chunks), model(tokens), rtol=0, atol=1e-5)


def test_a_sequence_longer_than_the_table_is_an_error() -> None:
    model, _ = _pair(SHAPES["pre-norm"])
    with pytest.raises(ValueError, match="65 tokens is longer than the model's 64 positions"):
        model(_tokens(1, 65))


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    config = OptConfig(**SMALL)
    model, _ = _pair(config)
    tokens = _tokens(2)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.train()(tokens))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(model.eval()(tokens), model(tokens))
    still = config.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    undropped = families.build(still)
    undropped.load_state_dict(model.state_dict())
    torch.testing.assert_close(undropped.train()(tokens), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["dropout", "attention_dropout"])
def test_both_dropouts_act(part: str) -> None:
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    config = OptConfig(**SMALL, **{**off, part: 0.5})
    model = families.build(config)
    model.load_state_dict(_pair(OptConfig(**SMALL))[0].state_dict())
    tokens = _tokens(2)
    assert not torch.allclose(model.train()(tokens), model.eval()(tokens), atol=1e-3)


@pytest.mark.parametrize("shape", ["pre-norm", "post-norm-projected"])
def test_blocks_compile_as_one_graph_each_and_agree(shape: str) -> None:
    model, _ = _pair(SHAPES[shape])
    model.train()
    tokens = _tokens(2)

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)
        for block in model.blocks:
            # Random numbers of a compiled dropout differ from the eager ones.
            block.dropout = block.attention.dropout = 0.0
        logits = model(tokens)
        logits.square().mean().backward()
        return logits.detach(), [weight.grad.clone() for weight in model.parameters()]

    plain, plain_gradients = run()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, gradients = run()
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_bfloat16_and_near(shape: str) -> None:
    model, _ = _pair(SHAPES[shape])
    tokens = _tokens(2)
    with torch.no_grad():
        exact = model(tokens)
        half = model.bfloat16()(tokens)
    assert half.dtype == torch.bfloat16
    error = (half.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.03


def test_initial_loss_of_a_fresh_model_is_that_of_a_uniform_guess() -> None:
    config = PRESETS["opt-8m"].config
    model = _meta(config).to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(full_value(name, tuple(weight.shape), model.initial_value(name), seed=1))
        tokens = torch.randint(4, config.vocabulary_size, (1, 64), generator=torch.Generator().manual_seed(0))
        loss = nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    assert loss.item() == pytest.approx(torch.tensor(float(config.vocabulary_size)).log().item(), abs=0.02)
