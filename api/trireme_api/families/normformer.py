"""NormFormer (arXiv 2110.09456): the fairseq-GPT decoder with more normalisation in each block, and a masked model.

Placement and initial values: fairseq modules/transformer_layer.py. Training settings: examples/normformer/train_lm.sh
there, its README and the names of the authors' runs. The paper's text was only to be had second hand.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trireme_api.families.activations import BlockMemory, Pass, PerToken
from trireme_api.families.base import Preset, PublishedRecipe
from trireme_api.families.gpt import GptConfig, recipe
from trireme_api.families.transformer import TransformerConfig
from trireme_api.families.xlmr import XlmrConfig


class NormFormerBlocks(TransformerConfig):
    """Each addition can be switched off; without any it is the pre-LN baseline, parameter by parameter."""

    post_attention_norm: bool = True
    """LayerNorm on what attention gives, before it is added to the residual stream."""
    head_scale: Literal["none", "paper", "code"] = "paper"
    """A factor per head: before the output projection (the paper's equation), or after it as the authors' code has it,
    which is another function as soon as the factors differ (fairseq issues 3973, 3983)."""
    inner_norm: bool = True
    """LayerNorm over the feed-forward layer's inner activations."""
    residual_scale: bool = False
    """A factor per channel on the residual stream that the feed-forward layer adds to. The paper uses it at 125M and
    355M; from 1.3B on it hurt."""
    activation: Literal["gelu", "relu2"] = "gelu"

    def extra_parameters(self) -> int:
        """Of one block, beyond the baseline's."""
        return (
            2 * self.width * self.post_attention_norm
            + self.heads * (self.head_scale != "none")
            + 2 * self.feed_forward_width * self.inner_norm
            + self.width * self.residual_scale
        )

    def block_parameters(self) -> int:
        return super().block_parameters() + self.extra_parameters()

    def undivided_parameters(self) -> int:
        more = 2 * self.width * self.post_attention_norm + self.width * self.residual_scale
        return super().undivided_parameters() + more + self.heads * (self.head_scale == "code")

    @property
    def nonlinearity(self) -> Literal["gelu", "relu", "relu2"]:
        return self.activation

    def attention_memory(self, one: Pass) -> tuple[PerToken, PerToken]:
        kept, work = super().attention_memory(one)
        scaled = {"none": 0.0, "paper": 1 / one.tensor, "code": 1.0}[self.head_scale]
        return kept + PerToken(values=self.width * (scaled + self.post_attention_norm)), work

    def feed_forward_memory(self, index: int, one: Pass) -> BlockMemory:
        plain = super().feed_forward_memory(index, one)
        if not self.inner_norm:
            return plain
        # The norm keeps its input, which is the activation's result, and its own result goes into the product.
        d, f = self.width, self.feed_forward_width // one.tensor
        kept = plain.kept + PerToken(values=f)
        # Divided, the norm is no fused kernel, and takes its backward pass in fp32.
        work = PerToken(values=f + d, single=3 * f * (one.tensor > 1))
        return BlockMemory(kept, work, plain.weight_gradients)


class NormFormerConfig(GptConfig, NormFormerBlocks):
    family: ClassVar[str] = "normformer"


class MaskedNormFormerConfig(XlmrConfig, NormFormerBlocks):
    """A reconstruction. The paper trains masked models of RoBERTa's base shape; its text was not to be had, and the
    authors' public code for them builds no head scale (fairseq, branch normformer2: `TransformerEncoderLayer`). Here:
    the xlmr network, RoBERTa's with the norms in front of the sub-layers, with the additions in each block."""

    family: ClassVar[str] = "normformer-masked"

    vocabulary_size: int = Field(default=50265, ge=4)
    """RoBERTa's dictionary."""


_RUNS = "fairseq examples/normformer: train_lm.sh, README, run names (arXiv 2110.09456)"


def _preset(
    name: str, layers: int, width: int, heads: int, batch: float, learning_rate: float, warmup: int, *,
    dropout: float = 0.1, residual_scale: bool = False, activation: Literal["gelu", "relu2"] = "gelu", note: str = "",
) -> Preset:  # fmt: skip
    config = NormFormerConfig(
        layers=layers, width=width, heads=heads, dropout=dropout, attention_dropout=dropout,
        residual_scale=residual_scale, activation=activation,
    )  # fmt: skip
    return Preset(name=name, config=config, recipe=recipe(batch, learning_rate, warmup, source=_RUNS), note=note)


_TINY = NormFormerConfig(
    layers=2, width=64, heads=2, vocabulary_size=512, maximum_positions=256, residual_scale=True
)
_MASKED_TINY = MaskedNormFormerConfig(
    layers=2, width=64, heads=2, vocabulary_size=512, maximum_positions=256, residual_scale=True
)
_MASKED_BATCH = 2048 * 512
_MASKED_RECIPE = PublishedRecipe(
    peak_learning_rate=1.0e-3, batch_tokens=_MASKED_BATCH, warmup_tokens=10_000 * _MASKED_BATCH,
    decay_tokens=500_000 * _MASKED_BATCH, sequence_length=512, clip=0.0, betas=(0.9, 0.98), weight_decay=0.01,
    final_fraction=0.0, source="chosen here: no source tells the masked runs' settings",
)  # fmt: skip

PRESETS = (
    Preset(
        "normformer-tiny", _TINY, recipe(1 / 128, 3e-3, 100, source="chosen here"),
        "for tests; not a size of the paper",
    ),
    _preset("normformer-125m", 12, 768, 12, 0.5, 3.0e-3, 750, residual_scale=True),
    _preset("normformer-355m", 24, 1024, 16, 0.5, 1.0e-3, 750, dropout=0.0, residual_scale=True),
    _preset("normformer-1.3b", 24, 2048, 32, 1, 6.0e-4, 375),
    _preset(
        "normformer-2.7b", 32, 2560, 32, 1, 6.0e-4, 375, activation="relu2",
        note="additions of the README; the run that was evaluated is named after inner norm and head scale alone",
    ),
    Preset("normformer-masked-tiny", _MASKED_TINY, _MASKED_RECIPE, "for tests; not a size of the paper"),
    Preset(
        "normformer-masked-125m",
        MaskedNormFormerConfig(layers=12, width=768, heads=12, residual_scale=True),
        _MASKED_RECIPE,
        "RoBERTa's base shape; a reconstruction",
    ),
)
