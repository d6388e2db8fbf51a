"""Mixture-of-experts language models (arXiv 2112.10684): the GPT family with experts in every second block.

Shapes and settings: fairseq examples/moe_lm and the names of the authors' runs there; the paper's own text was not to
be had.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trireme_api.families.base import ParameterCount, Preset, PublishedRecipe
from trireme_api.families.gpt import GptConfig, recipe
from trireme_api.schema import PositiveFloat, PositiveInt

CHOICES = 2
"""Experts that take each token."""


class MoeConfig(GptConfig):
    family: ClassVar[str] = "moe"

    experts: PositiveInt = 512
    """In each mixture; each is a feed-forward layer of the dense model's size."""
    moe_every: PositiveInt = 2
    """Block i, from 0, has a mixture where i + 1 is a multiple of this."""
    capacity: Literal["limited", "dropless"] = "limited"
    """limited: an expert takes at most capacityFactor·ceil(S / experts) of the S tokens of a micro-batch; what is
    beyond is dropped, and only the residual goes on. dropless: all of them."""
    capacity_factor: PositiveFloat = 2.0
    evaluation_capacity: float = Field(default=1.0, gt=0, le=1)
    """At evaluation an expert takes at most this share of the tokens; 1 drops none, so that a score does not depend on
    the batch it is in."""
    gate_loss_weight: float = Field(default=0.01, ge=0)
    """Of the balance loss, summed over the mixtures."""
    expert_gradients: Literal["root", "mean"] = "root"
    """root: gradients of experts are √experts times the mean over all tokens, as the authors' code leaves them (it
    divides their sum by √experts, not by experts). mean: as all other gradients."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.experts < CHOICES:
            raise ValueError(f"experts must be at least {CHOICES}, one for each choice of a token; got {self.experts}")
        if self.moe_every > self.layers:
            raise ValueError(f"moeEvery {self.moe_every} is more than the {self.layers} layers: no block has experts")
        return self

    @property
    def mixtures(self) -> int:
        """Blocks with experts."""
        return self.layers // self.moe_every

    def expert_parameters(self) -> int:
        """Of one expert."""
        d, f = self.width, self.feed_forward_width
        return 2 * d * f + f + d

    def block_parameters(self) -> int:
        dense = super().block_parameters()
        return dense + (self.experts - 1) * self.expert_parameters() + self.width * self.experts

    def parameters(self) -> ParameterCount:
        dense = self.outer_parameters() + self.layers * super().block_parameters()
        gates = self.mixtures * self.width * self.experts
        more = self.mixtures * self.expert_parameters()
        return ParameterCount(
            total=dense + gates + (self.experts - 1) * more, activated=dense + gates + (CHOICES - 1) * more
        )

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        d, f = self.width, self.feed_forward_width
        mixture = (CHOICES - 1) * 2 * 2 * d * f + 2 * d * self.experts
        return super().block_flops_per_token(sequence_length, causal=causal) + self.mixtures * mixture

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        # The weights of the choices need the experts' results, so only a dense block leaves its last product out.
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
