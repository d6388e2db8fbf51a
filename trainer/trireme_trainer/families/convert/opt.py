"""OPT ↔ Transformers' `OPTForCausalLM`.

A trap on the way: checkpoints written by Transformers before 4.20.1 lack the final LayerNorm; they are refused as
incomplete rather than run without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from trireme_api.families.opt import PAD_TOKEN, OptConfig
from trireme_api.schema import problems

from trireme_trainer.families.convert.common import ConversionError
from trireme_trainer.families.convert.names import Names

NAMES = Names(
    bare="model.",
    outer={
        "embed_tokens": "model.decoder.embed_tokens",
        "embed_positions": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "final_norm": "model.decoder.final_layer_norm",
    },
    layers="model.decoder.layers",
)


def config_to_hugging_face(config: OptConfig, vocabulary_size: int | None = None) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": vocabulary_size or config.vocabulary_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.embedding_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.feed_forward_width,
        "max_position_embeddings": config.maximum_positions,
        "do_layer_norm_before": config.pre_norm,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "init_std": config.initial_std,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "_remove_final_layer_norm": False,
        "layerdrop": 0.0,
        "pad_token_id": PAD_TOKEN,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "prefix": "</s>",
    }


_ONLY: dict[str, Any] = {
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
    "_remove_final_layer_norm": False,
    "pad_token_id": PAD_TOKEN,
}


def config_from_hugging_face(data: Mapping[str, Any], pad_vocabulary_to: int = 8) -> OptConfig:
    for key, value in _ONLY.items():
        if data.get(key, value) != value:
            raise ConversionError(f"config.json: {key} is {data[key]!r}; only {value!r} is built here")
    try:
        return OptConfig(
            vocabulary_size=-(-int(data["vocab_size"]) // pad_vocabulary_to) * pad_vocabulary_to,
            width=data["hidden_size"],
            embedding_width=data.get("word_embed_proj_dim") or data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            feed_forward_width=data["ffn_dim"],
            maximum_positions=data["max_position_embeddings"],
            pre_norm=data.get("do_layer_norm_before", True),
            dropout=data.get("dropout", 0.1),
            # Released configurations say 0 because they serve inference; training used 0.1 (paper §2.2).
            attention_dropout=data.get("attention_dropout") or data.get("dropout", 0.1),
        )
    except KeyError as error:
        raise ConversionError(f"config.json: {error.args[0]} is missing") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {problems(error)[0]}") from None
