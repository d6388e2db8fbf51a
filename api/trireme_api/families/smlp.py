"""Sparse all-MLP (arXiv 2203.06850): gMLP with experts for channels (sMoE) and for tokens (tMoE), no attention.

A reconstruction. Neither code nor the paper's text was to be had. Confirmed by its abstract and secondary sources: N1
dense blocks and N2 sparse ones; a sparse block is an sMoE, which cuts the hidden channels into chunks and sends them to
experts, and a tMoE after BASE layers in place of a feed-forward layer; deterministic routing of chunks, and partial
prediction, are what keeps the sMoE from seeing ahead. Chosen here: what the spatial experts are (a triangular matrix
each), the order of blocks (dense ones first), widths and numbers of blocks and experts, and all training settings.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trireme_api.families.activations import BlockMemory, Pass, PerToken, Unit
from trireme_api.families.base import ParameterCount, Preset
from trireme_api.families.gmlp import GmlpConfig, recipe
from trireme_api.families.mixture import MixtureConfig, Router
from trireme_api.schema import PositiveInt


class SmlpConfig(GmlpConfig, MixtureConfig):
    family: ClassVar[str] = "smlp"

    experts: PositiveInt = 64
    router: Router = "base"
    expert_gradients: Literal["root", "mean"] = "mean"
    sparse_layers: PositiveInt = Field(default_factory=lambda data: max(1, data["layers"] // 3))
    """The last so many blocks are sparse, those before dense."""
    spatial_experts: PositiveInt = 16
    """In each sparse block; as many chunks of channels."""
    spatial_routing: Literal["deterministic", "partial"] = "deterministic"
    """deterministic: chunk i to expert i. partial: a gate that sees the prefix alone chooses each chunk's expert for
    the positions behind it; the prefix itself goes the deterministic way, so that no position sees ahead."""
    prefix_share: float = Field(default=0.2, gt=0, lt=1)
    """Of maximumPositions, for spatialRouting: partial. 0.2 is from memory of the paper, unverified."""

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.sparse_layers > self.layers:
            raise ValueError(f"sparseLayers {self.sparse_layers} is more than the {self.layers} layers")
        if self.gated_width % self.spatial_experts:
            raise ValueError(
                f"spatialExperts must divide half of innerWidth, {self.gated_width}; got {self.spatial_experts}"
            )
        return self

    @property
    def prefix(self) -> int:
        """Positions that the spatial gate sees; 0: there is none."""
        return math.ceil(self.prefix_share * self.maximum_positions) if self.spatial_routing == "partial" else 0

    def spatial_gate_parameters(self) -> int:
        """Of one block: it sees one chunk at a time."""
        return self.gated_width if self.prefix else 0

    def spatial_parameters(self) -> int:
        one = self.maximum_positions**2 + self.maximum_positions
        dense = self.layers - self.sparse_layers
        return dense * one + self.sparse_layers * self.spatial_experts * one

    def block_parameters(self) -> int:
        gating = self.gating_parameters(self.spatial_experts) + self.spatial_gate_parameters()
        return gating + 2 * self.width + self.mixture_parameters()

    def sparse(self, index: int) -> bool:
        """Whether block `index`, from 0, has experts."""
        return index >= self.layers - self.sparse_layers

    def unit(self, index: int) -> Unit:
        if not self.sparse(index):
            return Unit(self.gating_parameters())
        routed = self.experts * self.expert_parameters()
        return Unit(self.block_parameters() - routed, routed)

    def block_memory(self, index: int, one: Pass) -> BlockMemory:
        if not self.sparse(index):
            return self.gating_memory(one)
        gating, mixture = self.gating_memory(one, self.spatial_experts), self.mixture_memory(one)
        stream = PerToken(values=2 * self.width, masks=self.width * (self.dropout > 0))
        gradients = max(gating.weight_gradients, mixture.weight_gradients)
        return BlockMemory(gating.kept + stream + mixture.kept, mixture.work, gradients)

    def parameters(self) -> ParameterCount:
        dense = (self.layers - self.sparse_layers) * self.gating_parameters()
        total = self.outer_parameters() + dense + self.sparse_layers * self.block_parameters()
        return ParameterCount(total=total, activated=total - self.sparse_layers * self.idle_parameters())

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        gating = self.layers * self.gating_flops_per_token(sequence_length, causal=causal)
        # Once per sequence and chunk.
        gates = 2 * self.spatial_experts * self.spatial_gate_parameters() / sequence_length
        spatial = gates if sequence_length > self.prefix else 0.0
        return gating + self.sparse_layers * (spatial + self.mixture_flops_per_token())

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        # As in moe: a block that ends with a mixture leaves nothing out.
        last = 2 * self.gated_width * self.width
        dense = self.layers - self.sparse_layers
        return self.block_flops_per_token(sequence_length, causal=causal) - dense * last


PRESETS = (
    Preset(
        "smlp-tiny",
        SmlpConfig(
            layers=2, sparse_layers=1, width=64, experts=4, spatial_experts=4, vocabulary_size=512,
            maximum_positions=256,
        ),
        replace(recipe(1 / 128, 1e-3, 100, "chosen here"), sequence_length=256),
        "for tests; not a size of the paper",
    ),
    Preset(
        "smlp-1.7b",
        SmlpConfig(layers=11, sparse_layers=5, width=768, experts=64, spatial_experts=16),
        recipe(0.5, 6.0e-4, 715, "chosen here: gpt-125m's"),
        "chosen here: the FLOPs of gpt-125m at 1,024 tokens; a reconstruction",
    ),
    Preset(
        "smlp-9.4b",
        SmlpConfig(layers=24, sparse_layers=8, width=1024, experts=128, spatial_experts=64),
        recipe(0.5, 3.0e-4, 715, "chosen here: gpt-355m's"),
        "the size that the paper reports, met with shapes chosen here; a reconstruction",
    ),
)  # fmt: skip
