"""OPT (arXiv 2205.01068): sizes of Table 1, arithmetic of §2.1, training settings of §2.2.

Sizes not in the table (8M, 760M) and the batch sizes in tokens are those of the authors' published launcher code.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from trireme_api.families.base import MEBI, ModelConfig, ParameterCount, Preset, PublishedRecipe
from trireme_api.schema import PositiveFloat, PositiveInt

PAD_TOKEN = 1
"""`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3."""
POSITION_OFFSET = PAD_TOKEN + 1
"""The first token of a sequence takes row 2 of the position table; row 1 belongs to padding, row 0 to nothing."""


class OptConfig(ModelConfig):
    family: ClassVar[str] = "opt"

    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    embedding_width: PositiveInt = Field(default_factory=lambda data: data["width"])
    """Of the token table; where it differs from `width`, bias-free projections lead in and out (released 350M)."""
    feed_forward_width: PositiveInt = Field(default_factory=lambda data: 4 * data["width"])
    vocabulary_size: int = Field(default=50272, ge=4)
    """50,265 entries padded to a multiple of 8."""
    maximum_positions: PositiveInt = 2048
    pre_norm: bool = True
    """LayerNorm before each sub-layer and after the last block; False: after each sub-layer (released 350M)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """After the attention and feed-forward sub-layers; none on embeddings."""
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    initial_std: PositiveFloat = 0.006
    """The same for every size (§2.2)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> OptConfig:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads; {self.width} is not a multiple of {self.heads}")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def projected(self) -> bool:
        return self.embedding_width != self.width

    def block_parameters(self) -> int:
        d, f = self.width, self.feed_forward_width
        attention = 4 * (d * d + d)
        feed_forward = 2 * d * f + f + d
        norms = 2 * 2 * d
        return attention + feed_forward + norms

    def parameters(self) -> ParameterCount:
        d, w = self.width, self.embedding_width
        tables = self.vocabulary_size * w + (self.maximum_positions + POSITION_OFFSET) * d
        projections = 2 * w * d if self.projected else 0
        final_norm = 2 * d if self.pre_norm else 0
        total = tables + projections + self.layers * self.block_parameters() + final_norm
        return ParameterCount(total=total, activated=total)

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        d, f = self.width, self.feed_forward_width
        keys = (sequence_length + 1) / 2 if causal else sequence_length
        projections = 2 * (4 * d * d + 2 * d * f)
        attention = 2 * 2 * d * keys
        return float(self.layers * (projections + attention))

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        # A pre-LN block ends with fc2, whose result nobody's gradient needs; post-LN normalises it, and needs it.
        last = 2 * self.feed_forward_width * self.width if self.pre_norm else 0
        return self.block_flops_per_token(sequence_length, causal=causal) - self.layers * last

    def forward_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        d, w = self.width, self.embedding_width
        head = 2 * self.vocabulary_size * w
        projections = 2 * 2 * w * d if self.projected else 0
        return self.block_flops_per_token(sequence_length, causal=causal) + projections + head

    def palm_flops_per_token(self, sequence_length: int) -> float:
        positions = (self.maximum_positions + POSITION_OFFSET) * self.width
        multiplying = self.parameters().total - positions
        return float(6 * multiplying + 12 * self.layers * self.width * sequence_length)


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
