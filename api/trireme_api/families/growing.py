"""GPT whose feed-forward layers grow into soft mixtures of experts, for anytime learning (arXiv 2106.09563).

A reconstruction: the paper's language models were never released. The network is the gpt family's; the growth is that
of the released vision code (`Finetune_Grow`): the most used expert of each layer is split under a new softmax gate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from trireme_api.families.activations import BlockMemory, Pass, PerToken
from trireme_api.families.base import ParameterCount, Preset
from trireme_api.families.gpt import GptConfig, recipe

_TREES = re.compile(r"\d+(,\d+)*(;\d+(,\d+)*)*")


class GrowingConfig(GptConfig):
    family: ClassVar[str] = "growing"
    grown_by: ClassVar[str] = "splits"

    splits: str = Field(default="", max_length=65536)
    """How each layer has grown: layers apart by `;`, in each the expert that every split divided, by `,`, from 0.
    `0,1;0,0`: in both layers expert 0 was split into 0 and 1, then in the first layer expert 1, in the second expert 0
    again. Empty: not at all. `trireme grow` tells the value."""

    @model_validator(mode="after")
    def _trees(self) -> Self:
        if not self.splits:
            return self
        if not _TREES.fullmatch(self.splits):
            raise ValueError(f"splits must be numbers apart by ',' with ';' between layers; got {self.splits[:40]!r}")
        trees = self.trees()
        if len(trees) != self.layers:
            raise ValueError(f"splits must name all {self.layers} layers, got {len(trees)}")
        if len({len(tree) for tree in trees}) > 1:
            raise ValueError("splits must be as many in each layer")
        for layer, tree in enumerate(trees):
            for number, expert in enumerate(tree):
                if expert > number:
                    raise ValueError(
                        f"splits: layer {layer} has experts 0 to {number} at split {number}, none numbered {expert}"
                    )
        return self

    def trees(self) -> list[tuple[int, ...]]:
        """By layer: which expert each split divided; split i, from 0, makes expert i + 1."""
        if not self.splits:
            return [()] * self.layers
        return [tuple(int(expert) for expert in tree.split(",")) for tree in self.splits.split(";")]

    def split(self, chosen: Sequence[int]) -> GrowingConfig:
        """Grown once more, by the expert `chosen` in each layer."""
        grown = [(*tree, expert) for tree, expert in zip(self.trees(), chosen, strict=True)]
        splits = ";".join(",".join(str(expert) for expert in tree) for tree in grown)
        return GrowingConfig.model_validate({**self.model_dump(), "splits": splits})

    def grown(self, times: int) -> GrowingConfig:
        tail = (0,) * times
        splits = ";".join(",".join(str(expert) for expert in (*tree, *tail)) for tree in self.trees())
        return GrowingConfig.model_validate({**self.model_dump(), "splits": splits if times or self.splits else ""})

    @property
    def growths(self) -> int:
        """Splits in each layer."""
        return len(self.trees()[0])

    def block_parameters(self) -> int:
        d, f = self.width, self.feed_forward_width
        return super().block_parameters() + self.growths * (2 * d * f + f + d + 2 * d + 2)

    def feed_forward_memory(self, index: int, one: Pass) -> BlockMemory:
        one_expert = super().feed_forward_memory(index, one)
        if not self.growths:
            return one_expert
        # Of each expert its own tensors and its result, which its share weighs; shares in fp32 and as they weigh.
        each = one_expert.kept + PerToken(values=self.width + 1, single=2)
        return BlockMemory(each * (self.growths + 1), one_expert.work, one_expert.weight_gradients)

    def parameters(self) -> ParameterCount:
        # Every expert computes every token: a gate only weighs.
        total = self.outer_parameters() + self.layers * self.block_parameters()
        return ParameterCount(total=total, activated=total)

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        d, f = self.width, self.feed_forward_width
        more = self.layers * self.growths * (2 * 2 * d * f + 2 * 2 * d)
        return super().block_flops_per_token(sequence_length, causal=causal) + more

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        if not self.growths:
            return super().recomputed_flops_per_token(sequence_length, causal=causal)
        # The gradients of the gates need what every expert gave.
        return self.block_flops_per_token(sequence_length, causal=causal)


PRESETS = (
    Preset(
        "growing-tiny",
        GrowingConfig(layers=2, width=64, heads=2, vocabulary_size=512, maximum_positions=256),
        recipe(1 / 128, 1e-3, 100, source="chosen here"),
        "for tests; no size of the paper's language models was to be had",
    ),
    Preset(
        "growing-125m",
        GrowingConfig(layers=12, width=768, heads=12),
        recipe(0.5, 6.0e-4, 715, source="chosen here: gpt-125m's"),
        "gpt-125m until it grows; a reconstruction",
    ),
)
