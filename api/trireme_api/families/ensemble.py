"""Ensembles of gpt models that answer together, for anytime learning (arXiv 2106.09563).

A reconstruction: the paper's language models were never released. How members are trained and averaged is that of the
released vision code: all of them, each with initial values and a data order of its own, probabilities averaged
(`KEnsemble`); or the newest alone, a copy of the one before it, logits averaged (`Ensemble`, the growing ensemble).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trireme_api.families.base import ParameterCount, Preset
from trireme_api.families.gpt import GptConfig, recipe
from trireme_api.schema import PositiveInt


class EnsembleConfig(GptConfig):
    """Layers, width and all else are those of one member."""

    family: ClassVar[str] = "ensemble"
    grown_by: ClassVar[str] = "members"

    members: PositiveInt = Field(default=3, le=1000)
    trains: Literal["all", "newest"] = "all"
    """`newest`: the others stay as they are; with growth the newest gets a copy beside it, which is the newest then."""

    @property
    def grows(self) -> bool:
        return self.trains == "newest"

    @property
    def growths(self) -> int:
        return self.members - 1 if self.grows else 0

    def grown(self, times: int) -> EnsembleConfig:
        return self.model_copy(update={"members": self.members + times})

    @property
    def member(self) -> GptConfig:
        return GptConfig.model_validate(self.model_dump(include=set(GptConfig.model_fields)))

    @property
    def turns(self) -> int:
        return 1 if self.trains == "newest" else self.members

    def parameters(self) -> ParameterCount:
        total = self.members * self.member.parameters().total
        return ParameterCount(total=total, activated=total)

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        return self.members * self.member.block_flops_per_token(sequence_length, causal=causal)

    def forward_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        return self.members * self.member.forward_flops_per_token(sequence_length, causal=causal)

    def train_flops_per_token(self, sequence_length: int) -> float:
        return self.turns * self.member.train_flops_per_token(sequence_length)

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        return self.turns * self.member.recomputed_flops_per_token(sequence_length, causal=causal)

    def palm_flops_per_token(self, sequence_length: int) -> float:
        return self.turns * self.member.palm_flops_per_token(sequence_length)


_TINY = {"layers": 2, "width": 64, "heads": 2, "vocabulary_size": 512, "maximum_positions": 256}
_BASE = {"layers": 12, "width": 768, "heads": 12}

PRESETS = (
    Preset(
        "ensemble-tiny",
        EnsembleConfig(**_TINY, members=2, trains="all"),
        recipe(1 / 128, 1e-3, 100, source="chosen here"),
        "for tests; no size of the paper's language models was to be had",
    ),
    Preset(
        "ensemble-125m",
        EnsembleConfig(**_BASE, members=3, trains="all"),
        recipe(0.5, 6.0e-4, 715, source="chosen here: gpt-125m's"),
        "three of gpt-125m, as many as the released vision code has; a reconstruction",
    ),
    Preset(
        "growing-ensemble-tiny",
        EnsembleConfig(**_TINY, members=1, trains="newest"),
        recipe(1 / 128, 1e-3, 100, source="chosen here"),
        "for tests; no size of the paper's language models was to be had",
    ),
    Preset(
        "growing-ensemble-125m",
        EnsembleConfig(**_BASE, members=1, trains="newest"),
        recipe(0.5, 6.0e-4, 715, source="chosen here: gpt-125m's"),
        "gpt-125m until it grows; a reconstruction",
    ),
)
