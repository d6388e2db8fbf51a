"""The dense baselines of "Efficient Large Scale Language Modeling with Mixtures of Experts" (arXiv 2112.10684): GPT-3's
shapes as fairseq builds them (`transformer_lm_gpt`), apart from OPT in positions, embedding scale, activation, initial
values and optimiser.

Shapes: fairseq examples/moe_lm/README.md. Training settings: the names of the authors' runs there; the paper's own text
was not to be had.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trireme_api.families.base import MEBI, Preset, PublishedRecipe
from trireme_api.families.transformer import TransformerConfig
from trireme_api.schema import PositiveInt


class GptConfig(TransformerConfig):
    """Pre-LN, GELU, fixed sinusoidal positions, token table scaled by √width and tied to the output layer."""

    family: ClassVar[str] = "gpt"

    vocabulary_size: int = Field(default=51200, ge=4)
    """GPT-2's BPE, padded: the size that the published parameter counts are of."""
    maximum_positions: PositiveInt = 2048
    """Positions are computed, not learned; this is what training used."""

    def outer_parameters(self) -> int:
        return self.vocabulary_size * self.width + 2 * self.width

    def lookup_parameters(self) -> int:
        return 0

    def outer_flops_per_token(self) -> float:
        return float(2 * self.vocabulary_size * self.width)


_RUNS = "run names of fairseq examples/moe_lm (arXiv 2112.10684)"


def recipe(
    batch: float, learning_rate: float, warmup_updates: int, *, weight_decay: float = 0.01, source: str = _RUNS
) -> PublishedRecipe:
    """`batch` in Mi tokens. Adam (0.9, 0.98), linear decay to zero over 300B tokens, no clipping."""
    tokens = round(batch * MEBI)
    return PublishedRecipe(
        peak_learning_rate=learning_rate, batch_tokens=tokens, warmup_tokens=warmup_updates * tokens,
        decay_tokens=300e9, clip=0.0, betas=(0.9, 0.98), weight_decay=weight_decay, final_fraction=0.0, source=source,
    )  # fmt: skip


def _preset(
    name: str, layers: int, width: int, heads: int, batch: float, learning_rate: float, warmup: int,
    dropout: float = 0.1, note: str = "",
) -> Preset:  # fmt: skip
    # No source tells the dropout of attention probabilities; here it is that of the sub-layers.
    config = GptConfig(layers=layers, width=width, heads=heads, dropout=dropout, attention_dropout=dropout)
    return Preset(name=name, config=config, recipe=recipe(batch, learning_rate, warmup), note=note)


_TINY = GptConfig(layers=2, width=64, heads=2, vocabulary_size=512, maximum_positions=256)

PRESETS = (
    Preset(
        "gpt-tiny", _TINY, recipe(1 / 128, 1e-3, 100, source="chosen here"), "for tests; not a size of the paper"
    ),
    _preset(
        "gpt-125m", 12, 768, 12, 0.5, 6.0e-4, 715,
        note="learning rate of the sweep file; the run that was evaluated is named after 5e-3",
    ),
    _preset("gpt-355m", 24, 1024, 16, 0.5, 3.0e-4, 715, dropout=0.0),
    _preset("gpt-1.3b", 24, 2048, 32, 1, 2.0e-4, 357),
    _preset("gpt-2.7b", 32, 2560, 32, 1, 1.6e-4, 357),
    _preset("gpt-6.7b", 32, 4096, 32, 2, 1.2e-4, 187),
    _preset("gpt-13b", 40, 5120, 40, 2, 1.0e-4, 187),
)
