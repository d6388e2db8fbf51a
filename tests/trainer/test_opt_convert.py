"""Weights and configurations to Transformers and back, in memory and on disk."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig as TheirConfig
from transformers import OPTForCausalLM, OPTModel
from trireme_api.families import PRESETS
from trireme_api.families.opt import OptConfig
from trireme_trainer import families
from trireme_trainer.families.convert import (
    ConversionError,
    config_from_hugging_face,
    config_to_hugging_face,
    directory,
    from_hugging_face,
    to_hugging_face,
)

SMALL = {"vocabulary_size": 128, "maximum_positions": 32, "layers": 2, "width": 32, "heads": 4}
SHAPES = {
    "pre-norm": OptConfig(**SMALL),
    "post-norm-projected": OptConfig(**SMALL, pre_norm=False, embedding_width=16),
}
TOKENS = torch.randint(4, 120, (2, 20), generator=torch.Generator().manual_seed(0))


def _state(config: OptConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in families.build(config).named_parameters()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def _logits(config: OptConfig, state: dict[str, Tensor]) -> Tensor:
    model = families.build(config)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(TOKENS)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_exact(shape: str) -> None:
    config = SHAPES[shape]
    state = _state(config)
    _same(from_hugging_face(config, to_hugging_face(config, state)), state)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_takes_our_weights_whole_and_agrees(shape: str) -> None:
    config = SHAPES[shape]
    state = _state(config)
    reference = OPTForCausalLM(TheirConfig(**config_to_hugging_face(config), attn_implementation="eager")).eval()
    result = reference.load_state_dict(to_hugging_face(config, state), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    with torch.no_grad():
        theirs = reference(TOKENS).logits
    assert (_logits(config, state) - theirs).abs().max() <= 1e-5
    _same(from_hugging_face(config, reference.state_dict()), state)


def test_a_bare_model_without_the_output_layer_converts() -> None:
    config = SHAPES["pre-norm"]
    bare = OPTModel(TheirConfig(**config_to_hugging_face(config)))
    state = from_hugging_face(config, bare.state_dict())
    assert torch.equal(state["embed_tokens.weight"], bare.decoder.embed_tokens.weight)


def test_vocabulary_is_padded_with_zero_rows_and_cut_back() -> None:
    """A tokenizer of 125 entries in a model of 128."""
    config = SHAPES["pre-norm"]
    unpadded = OPTForCausalLM(TheirConfig(**config_to_hugging_face(config, vocabulary_size=125))).eval()
    read = config_from_hugging_face(unpadded.config.to_dict())
    assert read.vocabulary_size == 128
    state = from_hugging_face(read, unpadded.state_dict())
    assert not state["embed_tokens.weight"][125:].any()
    assert isinstance(read, OptConfig)
    with torch.no_grad():
        theirs = unpadded(TOKENS).logits
    ours = _logits(read, state)
    assert (ours[..., :125] - theirs).abs().max() <= 1e-5
    back = to_hugging_face(read, state, vocabulary_size=125)
    _same({**back, "lm_head.weight": back["model.decoder.embed_tokens.weight"]}, unpadded.state_dict())


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("opt-", "xglm-", "xlmr-"))])
def test_configuration_of_every_preset_survives_the_round_trip(name: str) -> None:
    config = PRESETS[name].config
    assert config_from_hugging_face(config_to_hugging_face(config)) == config


def test_transformers_counts_the_same_parameters_for_released_350m() -> None:
    with torch.device("meta"):
        reference = OPTForCausalLM(TheirConfig(**config_to_hugging_face(PRESETS["opt-350m"].config)))
    assert reference.num_parameters() == 331_196_416


class TestRefusals:
    config = SHAPES["pre-norm"]

    def _theirs(self) -> dict[str, Tensor]:
        return to_hugging_face(self.config, _state(self.config))

    def test_missing_final_norm_of_old_checkpoints(self) -> None:
        weights = {k: v for k, v in self._theirs().items() if "decoder.final_layer_norm" not in k}
        with pytest.raises(ConversionError, match=r"missing: final_norm\.bias, final_norm\.weight"):
            from_hugging_face(self.config, weights)

    def test_left_over_weights(self) -> None:
        weights = {**self._theirs(), "model.decoder.layers.7.fc1.weight": torch.zeros(1)}
        with pytest.raises(ConversionError, match=r"no place for: model\.decoder\.layers\.7\.fc1\.weight"):
            from_hugging_face(self.config, weights)

    def test_wrong_shape(self) -> None:
        weights = {**self._theirs(), "model.decoder.layers.0.fc1.bias": torch.zeros(3)}
        with pytest.raises(ConversionError, match=r"blocks\.0\.feed_forward\.fc1\.bias: shape \(3,\)"):
            from_hugging_face(self.config, weights)

    def test_untied_output_layer(self) -> None:
        weights = {**self._theirs(), "lm_head.weight": torch.zeros(128, 32)}
        with pytest.raises(ConversionError, match="ties the two"):
            from_hugging_face(self.config, weights)

    def test_larger_vocabulary_than_the_model(self) -> None:
        small = OptConfig(**{**SMALL, "vocabulary_size": 64})
        with pytest.raises(ConversionError, match="128 rows, but the model has a vocabulary of 64"):
            from_hugging_face(small, self._theirs())

    def test_cutting_to_more_than_there_is(self) -> None:
        with pytest.raises(ConversionError, match="cannot be cut to 129"):
            to_hugging_face(self.config, _state(self.config), vocabulary_size=129)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
            ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
            ({"enable_bias": False}, "enable_bias"),
            ({"pad_token_id": 0}, "pad_token_id"),
            ({"model_type": "llama"}, "'llama' has no family"),
            ({"num_attention_heads": 5}, "multiple of heads"),
            ({"hidden_size": -1}, "width"),
        ],
    )
    def test_configurations_not_built_here(self, change: dict[str, object], words: str) -> None:
        with pytest.raises(ConversionError, match=words):
            config_from_hugging_face({**config_to_hugging_face(self.config), **change})

    def test_configuration_without_a_field(self) -> None:
        data = config_to_hugging_face(self.config)
        del data["ffn_dim"]
        with pytest.raises(ConversionError, match="ffn_dim is missing"):
            config_from_hugging_face(data)


class TestDirectory:
    @pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_transformers_loads_what_we_save(self, tmp_path: Path, shape: str, shard_bytes: int) -> None:
        config, state = SHAPES[shape], _state(SHAPES[shape])
        files = directory.save(tmp_path, config, state, vocabulary_size=125, shard_bytes=shard_bytes)
        assert (len(files) > 1) == (shard_bytes == 10_000)
        reference, info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            theirs = reference.eval()(TOKENS).logits
        assert (_logits(config, state)[..., :125] - theirs).abs().max() <= 1e-5

    @pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
    def test_we_load_what_transformers_saves(self, tmp_path: Path, max_shard_size: str) -> None:
        config = SHAPES["post-norm-projected"]
        reference = OPTForCausalLM(TheirConfig(**config_to_hugging_face(config))).eval()
        reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        read, state = directory.load(tmp_path)
        assert read == config
        with torch.no_grad():
            assert (_logits(config, state) - reference(TOKENS).logits).abs().max() <= 1e-5

    def test_pickled_weights_of_older_releases(self, tmp_path: Path) -> None:
        config, state = SHAPES["pre-norm"], _state(SHAPES["pre-norm"])
        directory.save(tmp_path, config, state)
        (tmp_path / "model.safetensors").unlink()
        torch.save(to_hugging_face(config, state), tmp_path / "pytorch_model.bin")
        _same(directory.load(tmp_path)[1], state)

    def test_half_precision_is_kept(self, tmp_path: Path) -> None:
        config = SHAPES["pre-norm"]
        state = {name: weight.bfloat16() for name, weight in _state(config).items()}
        directory.save(tmp_path, config, state)
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
        _same(directory.load(tmp_path)[1], state)

    def test_a_shard_of_the_index_that_is_gone(self, tmp_path: Path) -> None:
        config = SHAPES["pre-norm"]
        files = directory.save(tmp_path, config, _state(config), shard_bytes=10_000)
        files[1].unlink()
        with pytest.raises(ConversionError, match="named in the index but not there"):
            directory.load(tmp_path)

    def test_an_index_that_points_elsewhere(self, tmp_path: Path) -> None:
        config = SHAPES["pre-norm"]
        directory.save(tmp_path, config, _state(config), shard_bytes=10_000)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": "../../etc/x.safetensors"}}))
        with pytest.raises(ConversionError, match="outside the directory"):
            directory.load(tmp_path)

    def test_no_weights_no_configuration_no_json(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"no config\.json here"):
            directory.load(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ConversionError, match="not JSON"):
            directory.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config_to_hugging_face(SHAPES["pre-norm"])))
        with pytest.raises(ConversionError, match=r"no model\.safetensors"):
            directory.load(tmp_path)
