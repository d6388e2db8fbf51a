"""OPT (arXiv 2205.01068): sizes of Table 1, arithmetic of §2.1, training settings of §2.2.

Sizes not in the table (8M, 760M) and the batch sizes in tokens are those of the authors' published launcher code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from trireme_api.families.base import MEBI, Preset, PublishedRecipe
from trireme_api.families.transformer import PAD_TOKEN, POSITION_OFFSET, TransformerConfig
from trireme_api.schema import PositiveFloat, PositiveInt

__all__ = ["PAD_TOKEN", "POSITION_OFFSET", "PRESETS", "OptConfig"]


class OptConfig(TransformerConfig):
    family: ClassVar[str] = "opt"

    embedding_width: PositiveInt = Field(default_factory=lambda data: data["width"])
    """Of the token table; where it differs from `width`, bias-free projections lead in and out (released 350M)."""
    vocabulary_size: int = Field(default=50272, ge=4)
    """50,265 entries padded to a multiple of 8."""
    maximum_positions: PositiveInt = 2048
    pre_norm: bool = True
    """LayerNorm before each sub-layer and after the last block; False: after each sub-layer (released 350M)."""
    initial_std: PositiveFloat = 0.006
    """The same for every size (§2.2)."""

    @property
    def projected(self) -> bool:
        return self.embedding_width != self.width

    @property
    def nonlinearity(self) -> Literal["gelu", "relu", "relu2"]:
        return "relu"

    def tied_parameters(self) -> int:
        return self.vocabulary_size * self.embedding_width

    def outer_parameters(self) -> int:
        d, w = self.width, self.embedding_width
        projections = 2 * w * d if self.projected else 0
        final_norm = 2 * d if self.pre_norm else 0
        return self.vocabulary_size * w + self.lookup_parameters() + projections + final_norm

    def lookup_parameters(self) -> int:
        return (self.maximum_positions + POSITION_OFFSET) * self.width

    def outer_flops_per_token(self) -> float:
        d, w = self.width, self.embedding_width
        projections = 2 * 2 * w * d if self.projected else 0
        return float(projections + 2 * self.vocabulary_size * w)

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        if self.pre_norm:
            return super().recomputed_flops_per_token(sequence_length, causal=causal)
        # Post-LN normalises the result of fc2, and needs it.
        return self.block_flops_per_token(sequence_length, causal=causal)


_CODE = "metaseq/launcher/opt_job_constants.py; arXiv 2205.01068 §2.2"


def _preset(
    name: str,
    layers: int,
    width: int,
    heads: int,
    batch: float,
    learning_rate: float,
    note: str = "",
    source: str = "arXiv 2205.01068 §2.2, Table 1",
    **other: Any,
) -> Preset:
    config = OptConfig(layers=layers, width=width, heads=heads, **other)
    recipe = PublishedRecipe(
        peak_learning_rate=learning_rate,
        batch_tokens=round(batch * MEBI),
        # "over the first 2000 steps in OPT-175B, or over 375M tokens in our smaller baselines" (§2.2)
        warmup_tokens=2000 * round(batch * MEBI) if name == "opt-175b" else 375e6,
        decay_tokens=300e9,
        sequence_length=config.maximum_positions,
        source=source,
    )
    return Preset(name=name, config=config, recipe=recipe, note=note)


PRESETS = (
    _preset(
        "opt-tiny", 2, 64, 2, 1 / 128, 1e-3, vocabulary_size=512, maximum_positions=256,
        note="for tests; not a size of the paper", source="chosen here",
    ),
    _preset("opt-8m", 4, 128, 2, 0.125, 1e-3, note="from the authors' code, not in Table 1", source=_CODE),
    _preset("opt-125m", 12, 768, 12, 0.5, 6.0e-4),
    _preset(
        "opt-350m", 24, 1024, 16, 0.5, 3.0e-4, embedding_width=512, pre_norm=False,
        note="as released: post-LN, embeddings of width 512",
    ),
    _preset("opt-350m-preln", 24, 1024, 16, 0.5, 3.0e-4, note="as Table 1 has it: built like its siblings"),
    _preset("opt-760m", 24, 1536, 16, 0.5, 2.5e-4, note="from the authors' code, not in Table 1", source=_CODE),
    _preset("opt-1.3b", 24, 2048, 32, 1, 2.0e-4),
    _preset("opt-2.7b", 32, 2560, 32, 1, 1.6e-4),
    _preset("opt-6.7b", 32, 4096, 32, 2, 1.2e-4),
    _preset("opt-13b", 40, 5120, 40, 4, 1.0e-4),
    _preset("opt-30b", 48, 7168, 56, 4, 1.0e-4),
    _preset("opt-66b", 64, 9216, 72, 2, 0.8e-4),
    _preset("opt-175b", 96, 12288, 96, 2, 1.2e-4, note="learning rate of the paper; cut to 3e-5 during the run"),
)
