"""Weights and configurations to and from Hugging Face Transformers, as plain dictionaries; `directory` reads and writes
them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from trireme_api.families import ModelConfig
from trireme_api.families.opt import OptConfig

from trireme_trainer.families.convert import opt
from trireme_trainer.families.convert.common import ConversionError

__all__ = [
    "ConversionError", "config_from_hugging_face", "config_to_hugging_face", "from_hugging_face", "to_hugging_face",
]


def to_hugging_face(
    config: ModelConfig, state: Mapping[str, Tensor], vocabulary_size: int | None = None
) -> dict[str, Tensor]:
    """Our state dict (full tensors) under Transformers' names. `vocabulary_size` cuts the rows that only pad the
    vocabulary; left out: all rows. The tied output layer is not repeated. Raises ConversionError."""
    return opt.to_hugging_face(_opt(config), state, vocabulary_size)


def from_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' state dict under our names; a vocabulary smaller than `config`'s is padded with zero rows.

    Raises ConversionError naming the weights that are missing, left over, misshapen or not tied.
    """
    return opt.from_hugging_face(_opt(config), state)


def config_to_hugging_face(config: ModelConfig, vocabulary_size: int | None = None) -> dict[str, Any]:
    """The contents of `config.json`."""
    return opt.config_to_hugging_face(_opt(config), vocabulary_size)


def config_from_hugging_face(data: Mapping[str, Any], pad_vocabulary_to: int = 8) -> ModelConfig:
    """The configuration a `config.json` describes, its vocabulary padded to a multiple of `pad_vocabulary_to`.

    Raises ConversionError for another architecture or for an option of it that is not built here.
    """
    if data.get("model_type") == "opt":
        return opt.config_from_hugging_face(data, pad_vocabulary_to)
    raise ConversionError(f"config.json: model_type {data.get('model_type')!r} has no family here; known: 'opt'")


def _opt(config: ModelConfig) -> OptConfig:
    if isinstance(config, OptConfig):
        return config
    raise ConversionError(f"{type(config).__name__} has no conversion to Hugging Face")
