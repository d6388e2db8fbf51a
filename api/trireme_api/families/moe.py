"""Mixture-of-experts language models (arXiv 2112.10684): the GPT family with experts in every second block.

Shapes and settings: fairseq examples/moe_lm and the names of the authors' runs there; the paper's own text was not to
be had.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from trireme_api.families.activations import BlockMemory, Pass, Unit
from trireme_api.families.base import ParameterCount, Preset, PublishedRecipe
from trireme_api.families.gpt import GptConfig, recipe
from trireme_api.families.mixture import MixtureConfig
from trireme_api.schema import PositiveInt


class MoeConfig(GptConfig, MixtureConfig):
    """The other routers make it the Transformer mixtures that 2203.06850 compares with."""

    family: ClassVar[str] = "moe"

    moe_every: PositiveInt = 2
    """Block i, from 0, has a mixture where i + 1 is a multiple of this."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.moe_every > self.layers:
            raise ValueError(f"moeEvery {self.moe_every} is more than the {self.layers} layers: no block has experts")
        return self

    @property
    def mixtures(self) -> int:
        """Blocks with experts."""
        return self.layers // self.moe_every

    def block_parameters(self) -> int:
        return super().block_parameters() - self.expert_parameters() + self.mixture_parameters()

    def mixed(self, index: int) -> bool:
        """Whether block `index`, from 0, has experts."""
        return (index + 1) % self.moe_every == 0

    def unit(self, index: int) -> Unit:
        undivided = self.undivided_parameters()
        if not self.mixed(index):
            return Unit(super().block_parameters(), undivided=undivided)
        routed = self.experts * self.expert_parameters()
        # A gate in place of fc2's bias.
        whole = undivided - self.width + self.gate_parameters()
        return Unit(self.block_parameters() - routed, routed, whole)

    def feed_forward_memory(self, index: int, one: Pass) -> BlockMemory:
        return self.mixture_memory(one) if self.mixed(index) else super().feed_forward_memory(index, one)

    def parameters(self) -> ParameterCount:
        dense = self.outer_parameters() + self.layers * super().block_parameters()
        total = dense + self.mixtures * (self.mixture_parameters() - self.expert_parameters())
        return ParameterCount(total=total, activated=total - self.mixtures * self.idle_parameters())

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        more = self.mixture_flops_per_token() - 2 * 2 * self.width * self.feed_forward_width
        return super().block_flops_per_token(sequence_length, causal=causal) + self.mixtures * more

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        # What follows a mixture's last product keeps the weights for its backward pass: only a dense block leaves that
        # product out.
        last = 2 * self.feed_forward_width * self.width
        dense = self.layers - self.mixtures
        return self.block_flops_per_token(sequence_length, causal=causal) - dense * last

    def palm_flops_per_token(self, sequence_length: int) -> float:
        return float(6 * self.parameters().activated + 12 * self.layers * self.width * sequence_length)


def _preset(
    name: str, layers: int, width: int, heads: int, published: PublishedRecipe, dropout: float = 0.1, note: str = ""
) -> Preset:
    config = MoeConfig(layers=layers, width=width, heads=heads, dropout=dropout, attention_dropout=dropout)
    return Preset(name=name, config=config, recipe=published, note=note)


_TINY = MoeConfig(layers=2, width=64, heads=2, experts=4, vocabulary_size=512, maximum_positions=256)

PRESETS = (
    Preset(
        "moe-tiny", _TINY, recipe(1 / 128, 1e-3, 100, source="chosen here"), "for tests; not a size of the paper"
    ),
    _preset("moe-15b", 12, 768, 12, recipe(0.5, 6.0e-4, 750)),
    _preset("moe-52b", 24, 1024, 16, recipe(0.5, 3.0e-4, 715), dropout=0.0),
    _preset(
        "moe-207b", 24, 2048, 32, recipe(1, 1.6e-4, 2000, weight_decay=0.0),
        note="learning rate, warm-up and decay differ from its dense twin's",
    ),
    _preset("moe-1.1t", 32, 4096, 32, recipe(2, 1.2e-4, 187)),
)
