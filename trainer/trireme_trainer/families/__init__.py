"""From a family's numbers to its torch module."""

from __future__ import annotations

from trireme_api.families import ModelConfig
from trireme_api.families.opt import OptConfig

from trireme_trainer.families.base import Head, LanguageModel, Project
from trireme_trainer.families.opt import OptModel

__all__ = ["Head", "LanguageModel", "Project", "build"]


def build(config: ModelConfig) -> LanguageModel:
    """The bare model, unsharded and without values worth keeping; call under `torch.device("meta")`.

    Raises TypeError for a configuration no family here builds.
    """
    match config:
        case OptConfig():
            return OptModel(config)
    raise TypeError(f"no family builds {type(config).__name__}")
