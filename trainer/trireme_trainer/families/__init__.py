"""From a family's numbers to its torch module."""

from __future__ import annotations

from trireme_api.families import ModelConfig
from trireme_api.families.ensemble import EnsembleConfig
from trireme_api.families.gmlp import GmlpConfig
from trireme_api.families.gpt import GptConfig
from trireme_api.families.growing import GrowingConfig
from trireme_api.families.moe import MoeConfig
from trireme_api.families.normformer import MaskedNormFormerConfig, NormFormerConfig
from trireme_api.families.opt import OptConfig
from trireme_api.families.smlp import SmlpConfig
from trireme_api.families.xglm import XglmConfig
from trireme_api.families.xlmr import XlmrConfig

from trireme_trainer.families.base import Head, LanguageModel, Project
from trireme_trainer.families.ensemble import EnsembleModel
from trireme_trainer.families.gmlp import GmlpModel
from trireme_trainer.families.gpt import GptModel
from trireme_trainer.families.growing import GrowingModel
from trireme_trainer.families.moe import MoeModel
from trireme_trainer.families.normformer import MaskedNormFormerModel, NormFormerModel
from trireme_trainer.families.opt import OptModel
from trireme_trainer.families.smlp import SmlpModel
from trireme_trainer.families.xglm import XglmModel
from trireme_trainer.families.xlmr import XlmrModel

__all__ = ["Head", "LanguageModel", "Project", "build"]


def build(config: ModelConfig) -> LanguageModel:
    """The bare model, unsharded and without values worth keeping; call under `torch.device("meta")`.

    Raises TypeError for a configuration no family here builds.
    """
    match config:
        case OptConfig():
            return OptModel(config)
        # Before their parents.
        case MaskedNormFormerConfig():
            return MaskedNormFormerModel(config)
        case XlmrConfig():
            return XlmrModel(config)
        case XglmConfig():
            return XglmModel(config)
        case MoeConfig():
            return MoeModel(config)
        case NormFormerConfig():
            return NormFormerModel(config)
        case EnsembleConfig():
            return EnsembleModel(config)
        case GrowingConfig():
            return GrowingModel(config)
        case SmlpConfig():
            return SmlpModel(config)
        case GmlpConfig():
            return GmlpModel(config)
        case GptConfig():
            return GptModel(config)
    raise TypeError(f"no family builds {type(config).__name__}")
