"""XGLM ↔ Transformers' `XGLMForCausalLM`.

A trap on the way: Transformers counts the positions of a left-padded batch over its padding unless it is given
`position_ids`; fairseq, and this project, skips padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from trireme_api.families.transformer import PAD_TOKEN
from trireme_api.families.xglm import XglmConfig
from trireme_api.schema import problems

from trireme_trainer.families.convert.common import ConversionError
from trireme_trainer.families.convert.names import Names

NAMES = Names(
    bare="model.",
    outer={"embed_tokens": "model.embed_tokens", "final_norm": "model.layer_norm"},
    layers="model.layers",
)

_ONLY: dict[str, Any] = {
    "activation_function": "gelu",
    "scale_embedding": True,
    "tie_word_embeddings": True,
    "pad_token_id": PAD_TOKEN,
}


def config_to_hugging_face(config: XglmConfig, vocabulary_size: int | None = None) -> dict[str, Any]:
    return {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": vocabulary_size or config.vocabulary_size,
        "d_model": config.width,
        "num_layers": config.layers,
        "attention_heads": config.heads,
        "ffn_dim": config.feed_forward_width,
        "max_position_embeddings": config.maximum_positions,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "init_std": config.initial_std,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "decoder_start_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **_ONLY,
    }


def config_from_hugging_face(data: Mapping[str, Any], pad_vocabulary_to: int = 8) -> XglmConfig:
    for key, value in _ONLY.items():
        if data.get(key, value) != value:
            raise ConversionError(f"config.json: {key} is {data[key]!r}; only {value!r} is built here")
    try:
        return XglmConfig(
            vocabulary_size=-(-int(data["vocab_size"]) // pad_vocabulary_to) * pad_vocabulary_to,
            width=data["d_model"],
            layers=data["num_layers"],
            heads=data["attention_heads"],
            feed_forward_width=data["ffn_dim"],
            maximum_positions=data["max_position_embeddings"],
            dropout=data.get("dropout", 0.1),
            attention_dropout=data.get("attention_dropout", 0.1),
            initial_std=data.get("init_std", 0.02),
        )
    except KeyError as error:
        raise ConversionError(f"config.json: {error.args[0]} is missing") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {problems(error)[0]}") from None
