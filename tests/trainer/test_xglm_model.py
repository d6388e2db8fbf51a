"""XGLM and the GPT family against Transformers: the two share their network, and Transformers has XGLM's."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor, nn
from transformers import XGLMConfig as TheirConfig
from transformers import XGLMForCausalLM, XGLMTokenizer
from trireme_api.families import PRESETS
from trireme_api.families.gpt import GptConfig
from trireme_api.families.xglm import XglmConfig
from trireme_trainer import families
from trireme_trainer.data.tokenizer import open_encoder, sentence_pieces
from trireme_trainer.families.convert import (
    ConversionError,
    config_from_hugging_face,
    config_to_hugging_face,
    directory,
    from_hugging_face,
    to_hugging_face,
)
from trireme_trainer.layers.embedding import SinusoidalPositions

CONFIG = XglmConfig(vocabulary_size=128, maximum_positions=64, layers=3, width=48, heads=4, feed_forward_width=80)


def _pair() -> tuple[families.LanguageModel, XGLMForCausalLM]:
    torch.manual_seed(0)
    reference = XGLMForCausalLM(TheirConfig(**config_to_hugging_face(CONFIG), attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    with torch.device("meta"):
        model = families.build(CONFIG)
    model.load_state_dict(from_hugging_face(CONFIG, reference.state_dict()), assign=True)
    return model.eval(), reference


def _tokens(rows: int = 3) -> Tensor:
    return torch.randint(4, 128, (rows, 40), generator=torch.Generator().manual_seed(7))


def test_logits_and_gradients_equal_transformers() -> None:
    model, reference = _pair()
    ours, theirs = model(_tokens()), reference(_tokens()).logits
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5
    for logits in (ours, theirs):
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), _tokens()[:, 1:].flatten()).backward()
    expected = from_hugging_face(CONFIG, {name: weight.grad for name, weight in reference.named_parameters()})
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers_with_positions_that_skip_padding(side: str) -> None:
    model, reference = _pair()
    tokens = _tokens(2)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    if side == "right":
        mask = mask.flip(1)
    padded = tokens.masked_fill(mask == 0, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(padded, mask_BT=mask)
        theirs = reference(padded, attention_mask=mask, position_ids=positions).logits
    assert (ours - theirs)[mask == 1].abs().max() <= 1e-5


def test_without_position_ids_transformers_counts_over_left_padding() -> None:
    """The trap, as a fact about the reference: were it gone, the note in the conversion would be out of date."""
    model, reference = _pair()
    tokens = _tokens(1)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    with torch.no_grad():
        ours, theirs = model(tokens, mask_BT=mask), reference(tokens, attention_mask=mask).logits
    assert (ours - theirs)[mask == 1].abs().max() > 1e-2


def test_positions_are_halves_and_start_at_row_two() -> None:
    table = SinusoidalPositions(8, 6, 2)(3, torch.device("cpu"))
    rates = torch.tensor([1.0, 0.01, 0.0001])
    for index, row in enumerate(table):
        angles = (index + 2) * rates
        torch.testing.assert_close(row, torch.cat([angles.sin(), angles.cos()]), rtol=0, atol=1e-6)
    padded = SinusoidalPositions(8, 6, 2)(3, torch.device("cpu"), torch.tensor([[0, 1, 1]]))
    assert not padded[0, 0].any()
    assert torch.equal(padded[0, 1:], table[:2])
    assert SinusoidalPositions(8, 5, 2)(3, torch.device("cpu")).shape == (3, 5)
    with pytest.raises(ValueError, match="9 tokens is longer than the model's 8 positions"):
        SinusoidalPositions(8, 6, 2)(9, torch.device("cpu"))


def test_directories_go_both_ways(tmp_path: Path) -> None:
    model, reference = _pair()
    state = dict(model.state_dict())
    assert to_hugging_face(CONFIG, state).keys() == {k for k in reference.state_dict() if k != "lm_head.weight"}
    directory.save(tmp_path / "ours", CONFIG, state)
    loaded = XGLMForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (loaded(_tokens()).logits - model(_tokens())).abs().max() <= 1e-5
    reference.save_pretrained(tmp_path / "theirs")
    config, read = directory.load(tmp_path / "theirs")
    assert config == CONFIG
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_what_is_not_built_here_is_refused() -> None:
    with pytest.raises(ConversionError, match="scale_embedding is False"):
        config_from_hugging_face({**config_to_hugging_face(CONFIG), "scale_embedding": False})
    gpt = GptConfig(vocabulary_size=128, layers=1, width=16, heads=2)
    with pytest.raises(ConversionError, match="gpt: Transformers has no model of this family"):
        config_to_hugging_face(gpt)


def test_gpt_is_the_same_network() -> None:
    """So what Transformers says of XGLM holds for it, too: same weights, same logits."""
    model, _ = _pair()
    numbers = CONFIG.model_dump(exclude={"initial_std"})
    gpt = families.build(GptConfig(**numbers))
    gpt.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(gpt.eval()(_tokens()), model(_tokens()))


def test_transformers_counts_the_same_parameters() -> None:
    with torch.device("meta"):
        reference = XGLMForCausalLM(TheirConfig(**config_to_hugging_face(PRESETS["xglm-564m"].config)))
    assert reference.num_parameters() == PRESETS["xglm-564m"].config.parameters().total == 564_463_616


def test_ids_are_those_of_transformers_tokenizer_where_a_converted_model_can_tell() -> None:
    texts = ["The rower rowed in time, and the galley moved.", "Die Ruderer ruderten im Takt."]
    model = sentence_pieces.train(iter(texts * 20), 330)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    theirs = XGLMTokenizer(special + [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))])
    for text, ids in zip(texts, open_encoder(model, "here").text(texts), strict=True):
        assert theirs(text)["input_ids"] == [2, *ids.tolist()], "which is how documents begin here, too"
