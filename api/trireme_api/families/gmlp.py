"""gMLP (arXiv 2105.08050) as a causal language model: no attention, positions mixed by a learned T×T matrix.

A reconstruction from secondary sources and public reimplementations: neither paper nor code states how 2203.06850 made
gMLP causal (here the matrix is lower triangular) or with which settings it was trained. Embedding, output layer and
initial values beside the spatial ones are the gpt family's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator

from trireme_api.families.activations import BlockMemory, Pass, PerToken
from trireme_api.families.base import ModelConfig, ParameterCount, Preset, PublishedRecipe
from trireme_api.families.gpt import recipe as gpt_recipe
from trireme_api.schema import PositiveInt


class GmlpConfig(ModelConfig):
    """Blocks of one gating layer each; no positions beside the spatial matrices, token table tied and scaled."""

    family: ClassVar[str] = "gmlp"

    vocabulary_size: int = Field(default=51200, ge=4)
    """GPT-2's BPE, padded, as gpt's."""
    maximum_positions: PositiveInt = 1024
    """Rows and columns of a spatial matrix; a shorter sequence uses the leading ones."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Of the scaled embeddings, and after every sub-layer."""
    inner_width: PositiveInt = Field(default_factory=lambda data: 6 * data["width"])
    """Of a gating layer: one half of it gates the other."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.inner_width % 2:
            raise ValueError(f"innerWidth must be even, one half gates the other; got {self.inner_width}")
        return self

    @property
    def gated_width(self) -> int:
        return self.inner_width // 2

    def gating_parameters(self, spatial_experts: int = 1) -> int:
        """Of a gating layer and the norm before it."""
        d, half, n = self.width, self.gated_width, self.maximum_positions
        return 2 * d + (d * 2 * half + 2 * half) + 2 * half + spatial_experts * (n * n + n) + (half * d + d)

    def gating_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        """Forward. The same for any number of spatial experts: each mixes its share of the channels."""
        seen = (sequence_length + 1) / 2 if causal else sequence_length
        return 2 * 3 * self.width * self.gated_width + 2 * seen * self.gated_width

    def outer_parameters(self) -> int:
        return self.vocabulary_size * self.width + 2 * self.width

    def spatial_parameters(self) -> int:
        """Of all layers; they mix positions, and multiply no channels."""
        return self.layers * (self.maximum_positions**2 + self.maximum_positions)

    def block_parameters(self) -> int:
        return self.gating_parameters()

    def gating_memory(self, one: Pass, spatial_experts: int = 1) -> BlockMemory:
        """Of a gating layer with its norm: input, normalised input, the activation's input and result, what is mixed,
        the gate and the product; and the matrices' lower triangles, which are made anew for each micro-batch."""
        d, half, n = self.width, self.gated_width, self.maximum_positions
        triangles = spatial_experts * one.length**2 / one.tokens
        kept = PerToken(values=2 * d + 7 * half + triangles, masks=d * (self.dropout > 0))
        return BlockMemory(kept, PerToken(values=2 * half + d + triangles), half * d + spatial_experts * n * n)

    def block_memory(self, index: int, one: Pass) -> BlockMemory:
        return self.gating_memory(one)

    def parameters(self) -> ParameterCount:
        total = self.outer_parameters() + self.layers * self.gating_parameters()
        return ParameterCount(total=total, activated=total)

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        return self.layers * self.gating_flops_per_token(sequence_length, causal=causal)

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        # A block ends with a product whose result nobody's gradient needs.
        last = 2 * self.gated_width * self.width
        return self.block_flops_per_token(sequence_length, causal=causal) - self.layers * last

    def forward_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        head = 2 * self.vocabulary_size * self.width
        return self.block_flops_per_token(sequence_length, causal=causal) + head

    def palm_flops_per_token(self, sequence_length: int) -> float:
        """The spatial products' full square takes the place of attention's."""
        multiplying = self.parameters().activated - self.spatial_parameters()
        return float(6 * multiplying + 3 * self.layers * 2 * self.gated_width * sequence_length)


def recipe(batch: float, learning_rate: float, warmup_updates: int, source: str) -> PublishedRecipe:
    """As gpt's, at the papers' sequence length of 1,024 (from memory of 2203.06850, unverified)."""
    return replace(gpt_recipe(batch, learning_rate, warmup_updates, source=source), sequence_length=1024)


PRESETS = (
    Preset(
        "gmlp-tiny", GmlpConfig(layers=2, width=64, vocabulary_size=512, maximum_positions=256),
        replace(recipe(1 / 128, 1e-3, 100, "chosen here"), sequence_length=256),
        "for tests; not a size of the paper",
    ),
    Preset(
        "gmlp-125m", GmlpConfig(layers=14, width=768), recipe(0.5, 6.0e-4, 715, "chosen here: gpt-125m's"),
        "chosen here: the FLOPs of gpt-125m at 1,024 tokens; a reconstruction",
    ),
)  # fmt: skip
