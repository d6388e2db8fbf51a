"""XLM-R XL and XXL against Transformers."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import XLMRobertaXLConfig as TheirConfig
from transformers import XLMRobertaXLForMaskedLM
from trireme_api.families import PRESETS
from trireme_api.families.xlmr import XlmrConfig
from trireme_trainer import families
from trireme_trainer.families.convert import (
    ConversionError,
    config_from_hugging_face,
    config_to_hugging_face,
    directory,
    from_hugging_face,
    to_hugging_face,
)

CONFIG = XlmrConfig(vocabulary_size=128, maximum_positions=62, layers=3, width=48, heads=4, feed_forward_width=80)


def _pair() -> tuple[families.LanguageModel, XLMRobertaXLForMaskedLM]:
    torch.manual_seed(0)
    their_config = TheirConfig(**config_to_hugging_face(CONFIG), attn_implementation="eager")
    reference = XLMRobertaXLForMaskedLM(their_config).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(1.0 if name.lower().endswith("norm.weight") else 0.0, 0.2)
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
        nn.functional.cross_entropy(logits.flatten(0, 1), _tokens().flip(1).flatten()).backward()
    expected = from_hugging_face(CONFIG, {name: weight.grad for name, weight in reference.named_parameters()})
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers(side: str) -> None:
    model, reference = _pair()
    tokens = _tokens(2)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    if side == "right":
        mask = mask.flip(1)
    padded = tokens.masked_fill(mask == 0, 1)
    with torch.no_grad():
        ours = model(padded, mask_BT=mask)
        theirs = reference(padded, attention_mask=mask).logits
    assert (ours - theirs)[mask == 1].abs().max() <= 1e-5


def test_directories_go_both_ways_also_with_a_padded_vocabulary(tmp_path: Path) -> None:
    model, reference = _pair()
    state = dict(model.state_dict())
    assert to_hugging_face(CONFIG, state).keys() == dict(reference.named_parameters()).keys()
    directory.save(tmp_path / "ours", CONFIG, state, vocabulary_size=125)
    loaded = XLMRobertaXLForMaskedLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    tokens = _tokens().clamp(max=124)
    with torch.no_grad():
        assert (loaded(tokens).logits - model(tokens)[..., :125]).abs().max() <= 1e-5
    loaded.save_pretrained(tmp_path / "theirs")
    config, read = directory.load(tmp_path / "theirs")
    assert config == CONFIG
    assert not read["head_bias"][125:].any()
    assert torch.equal(read["head_bias"][:125], state["head_bias"][:125])


def test_what_is_not_built_here_is_refused() -> None:
    for change, words in (({"type_vocab_size": 2}, "type_vocab_size is 2"), ({"hidden_act": "relu"}, "hidden_act")):
        with pytest.raises(ConversionError, match=words):
            config_from_hugging_face({**config_to_hugging_face(CONFIG), **change})


def test_transformers_counts_the_same_parameters() -> None:
    with torch.device("meta"):
        reference = XLMRobertaXLForMaskedLM(TheirConfig(**config_to_hugging_face(PRESETS["xlmr-xl"].config)))
    assert reference.num_parameters() == PRESETS["xlmr-xl"].config.parameters().total
