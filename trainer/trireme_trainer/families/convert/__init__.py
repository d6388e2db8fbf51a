"""Weights and configurations to and from Hugging Face Transformers, as plain dictionaries; `directory` reads and writes
them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from trireme_api.families import ModelConfig
from trireme_api.families.normformer import MaskedNormFormerConfig
from trireme_api.families.opt import OptConfig
from trireme_api.families.xglm import XglmConfig
from trireme_api.families.xlmr import XlmrConfig

from trireme_trainer.families.convert import opt, xglm, xlmr
from trireme_trainer.families.convert.common import ConversionError
from trireme_trainer.families.convert.names import Names

__all__ = [
    "ConversionError", "config_from_hugging_face", "config_to_hugging_face", "from_hugging_face", "to_hugging_face",
]


def to_hugging_face(
    config: ModelConfig, state: Mapping[str, Tensor], vocabulary_size: int | None = None
) -> dict[str, Tensor]:
    """Our state dict (full tensors) under Transformers' names. `vocabulary_size` cuts the rows that only pad the
    vocabulary; left out: all rows. The tied output layer is not repeated. Raises ConversionError."""
    return _names(config).to_hugging_face(config, state, vocabulary_size)


def from_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' state dict under our names; a vocabulary smaller than `config`'s is padded with zero rows.

    Raises ConversionError naming the weights that are missing, left over, misshapen or not tied.
    """
    return _names(config).from_hugging_face(config, state)


def config_to_hugging_face(config: ModelConfig, vocabulary_size: int | None = None) -> dict[str, Any]:
    """The contents of `config.json`. Raises ConversionError for a family that Transformers has no model for."""
    match config:
        case MaskedNormFormerConfig():
            raise _unknown(config)
        case OptConfig():
            return opt.config_to_hugging_face(config, vocabulary_size)
        case XglmConfig():
            return xglm.config_to_hugging_face(config, vocabulary_size)
        case XlmrConfig():
            return xlmr.config_to_hugging_face(config, vocabulary_size)
    raise _unknown(config)


def config_from_hugging_face(data: Mapping[str, Any], pad_vocabulary_to: int = 8) -> ModelConfig:
    """The configuration a `config.json` describes, its vocabulary padded to a multiple of `pad_vocabulary_to`.

    Raises ConversionError for another architecture or for an option of it that is not built here.
    """
    match data.get("model_type"):
        case "opt":
            return opt.config_from_hugging_face(data, pad_vocabulary_to)
        case "xglm":
            return xglm.config_from_hugging_face(data, pad_vocabulary_to)
        case "xlm-roberta-xl":
            return xlmr.config_from_hugging_face(data, pad_vocabulary_to)
    raise ConversionError(
        f"config.json: model_type {data.get('model_type')!r} has no family here; known: 'opt', 'xglm', 'xlm-roberta-xl'"
    )


def _names(config: ModelConfig) -> Names:
    match config:
        case MaskedNormFormerConfig():
            raise _unknown(config)
        case OptConfig():
            return opt.NAMES
        case XglmConfig():
            return xglm.NAMES
        case XlmrConfig():
            return xlmr.NAMES
    raise _unknown(config)


def _unknown(config: ModelConfig) -> ConversionError:
    return ConversionError(f"{config.family}: Transformers has no model of this family")
