"""XLM-R XL and XXL ↔ Transformers' `XLMRobertaXLForMaskedLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from trireme_api.families.transformer import PAD_TOKEN, POSITION_OFFSET
from trireme_api.families.xlmr import XlmrConfig
from trireme_api.schema import problems

from trireme_trainer.families.convert.common import ConversionError
from trireme_trainer.families.convert.names import Names

NAMES = Names(
    bare="roberta.",
    outer={
        "embed_tokens": "roberta.embeddings.word_embeddings",
        "embed_positions": "roberta.embeddings.position_embeddings",
        "embed_segments": "roberta.embeddings.token_type_embeddings",
        "final_norm": "roberta.encoder.LayerNorm",
        "head_dense": "lm_head.dense",
        "head_norm": "lm_head.layer_norm",
        "head_bias": "lm_head.bias",
    },
    layers="roberta.encoder.layer",
    inner={
        "attention.q_proj.": "attention.self.query.",
        "attention.k_proj.": "attention.self.key.",
        "attention.v_proj.": "attention.self.value.",
        "attention.out_proj.": "attention.output.dense.",
        "attention_norm.": "attention.self_attn_layer_norm.",
        "feed_forward.fc1.": "intermediate.dense.",
        "feed_forward.fc2.": "output.dense.",
        "feed_forward_norm.": "LayerNorm.",
    },
    tied={"lm_head.decoder.weight": "embed_tokens.weight", "lm_head.decoder.bias": "head_bias"},
    rows=("embed_tokens.weight", "head_bias"),
)

_ONLY: dict[str, Any] = {
    "hidden_act": "gelu",
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "is_decoder": False,
    "pad_token_id": PAD_TOKEN,
}


def config_to_hugging_face(config: XlmrConfig, vocabulary_size: int | None = None) -> dict[str, Any]:
    return {
        "architectures": ["XLMRobertaXLForMaskedLM"],
        "model_type": "xlm-roberta-xl",
        "vocab_size": vocabulary_size or config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.maximum_positions + POSITION_OFFSET,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initial_std,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **_ONLY,
    }


def config_from_hugging_face(data: Mapping[str, Any], pad_vocabulary_to: int = 8) -> XlmrConfig:
    for key, value in _ONLY.items():
        if data.get(key, value) != value:
            raise ConversionError(f"config.json: {key} is {data[key]!r}; only {value!r} is built here")
    try:
        return XlmrConfig(
            vocabulary_size=-(-int(data["vocab_size"]) // pad_vocabulary_to) * pad_vocabulary_to,
            width=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            feed_forward_width=data["intermediate_size"],
            maximum_positions=int(data["max_position_embeddings"]) - POSITION_OFFSET,
            dropout=data.get("hidden_dropout_prob", 0.1),
            attention_dropout=data.get("attention_probs_dropout_prob", 0.1),
            initial_std=data.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConversionError(f"config.json: {error.args[0]} is missing") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {problems(error)[0]}") from None
