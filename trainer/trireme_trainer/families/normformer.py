"""NormFormer (arXiv 2110.09456): the GPT family's network, or for masked models XLM-R's, its blocks with more
normalisation."""

from __future__ import annotations

from torch import nn
from trireme_api.families.gpt import GptConfig
from trireme_api.families.normformer import MaskedNormFormerConfig, NormFormerBlocks, NormFormerConfig
from trireme_api.families.xlmr import XlmrConfig

from trireme_trainer.families.gpt import GptModel
from trireme_trainer.families.xlmr import XlmrModel
from trireme_trainer.layers.attention import SelfAttention
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.feed_forward import FeedForward
from trireme_trainer.layers.init import Constant, InitialValue


class NormFormerModel(GptModel):
    def block(self, config: GptConfig, index: int) -> nn.Module:
        assert isinstance(config, NormFormerConfig)
        return normformer_block(config)

    def initial_value(self, name: str) -> InitialValue:
        return _of_additions(name) or super().initial_value(name)


class MaskedNormFormerModel(XlmrModel):
    def block(self, config: XlmrConfig, index: int) -> nn.Module:
        assert isinstance(config, MaskedNormFormerConfig)
        return normformer_block(config)

    def initial_value(self, name: str) -> InitialValue:
        return _of_additions(name) or super().initial_value(name)


def _of_additions(name: str) -> Constant | None:
    """They change nothing at first but the scale of what they normalise: factors 1, biases 0."""
    module, _, kind = name.rpartition(".")
    if kind in ("head_scale", "residual_scale"):
        return Constant(1.0)
    if module.endswith((".post_attention_norm", ".inner_norm")):
        return Constant(1.0 if kind == "weight" else 0.0)
    return None


def normformer_block(config: NormFormerBlocks) -> TransformerBlock:
    d = config.width
    return TransformerBlock(
        d,
        SelfAttention(d, config.heads, config.attention_dropout, causal=config.causal, head_scale=config.head_scale),
        FeedForward(d, config.feed_forward_width, config.activation, inner_norm=config.inner_norm),
        dropout=config.dropout,
        post_attention_norm=config.post_attention_norm,
        residual_scale=config.residual_scale,
    )
