"""XLM-R XL and XXL (arXiv 2105.00572): bidirectional encoders of 3.5B and 10.7B parameters.

Shapes: the paper's table and the released configurations. The paper states no learning rate, warm-up or Adam settings:
what `recipe` says of them is this project's choice.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trireme_api.families.base import Preset, PublishedRecipe
from trireme_api.families.transformer import POSITION_OFFSET, TransformerConfig
from trireme_api.schema import PositiveFloat, PositiveInt


class XlmrConfig(TransformerConfig):
    """Pre-LN, GELU, learned positions, embeddings as they are; the output layer is dense, GELU, LayerNorm, and the
    token table with a bias."""

    family: ClassVar[str] = "xlmr"
    causal: ClassVar[bool] = False

    vocabulary_size: int = Field(default=250880, ge=4)
    """XLM-R's 250,002 SentencePiece entries, padded."""
    maximum_positions: PositiveInt = 512
    initial_std: PositiveFloat = 0.02

    def outer_parameters(self) -> int:
        d, v = self.width, self.vocabulary_size
        head = d * d + d + 2 * d + v
        return v * d + self.lookup_parameters() + 2 * d + head

    def lookup_parameters(self) -> int:
        """Positions, and the one row of segments."""
        return (self.maximum_positions + POSITION_OFFSET + 1) * self.width

    def outer_flops_per_token(self) -> float:
        return float(2 * self.width * self.width + 2 * self.vocabulary_size * self.width)


def _recipe(learning_rate: float) -> PublishedRecipe:
    batch = 2048 * 512
    return PublishedRecipe(
        peak_learning_rate=learning_rate, batch_tokens=batch, warmup_tokens=10_000 * batch,
        decay_tokens=500_000 * batch, sequence_length=512, clip=0.0, betas=(0.9, 0.98), weight_decay=0.01,
        final_fraction=0.0,
        source="2,048 sequences of 512, 500,000 updates: arXiv 2105.00572; everything else chosen here",
    )  # fmt: skip


_TINY = XlmrConfig(layers=2, width=64, heads=2, vocabulary_size=512, maximum_positions=256)

PRESETS = (
    Preset("xlmr-tiny", _TINY, _recipe(1e-3), "for tests; not a size of the paper"),
    Preset("xlmr-xl", XlmrConfig(layers=36, width=2560, heads=32), _recipe(1.0e-4)),
    Preset("xlmr-xxl", XlmrConfig(layers=48, width=4096, heads=32), _recipe(0.7e-4)),
)
