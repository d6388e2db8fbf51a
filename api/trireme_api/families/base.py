"""What every model family states about itself in closed form: `models`, `plan` and the trainer all read it here."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import Field

from trireme_api.families.activations import BlockMemory, Pass, Unit
from trireme_api.schema import PositiveInt, Spec

MEBI = 1024 * 1024
"""Batch sizes in the OPT code are multiples of 1024 · 1024 tokens; its paper prints them as M."""


@dataclass(frozen=True)
class ParameterCount:
    """Tied weights count once. `activated`: those that one token passes through (all of them if the model is dense)."""

    total: int
    activated: int


@dataclass(frozen=True)
class PublishedRecipe:
    """How the paper trained a size. Tokens throughout, so that it holds at any batch size."""

    peak_learning_rate: float
    batch_tokens: int
    warmup_tokens: float
    decay_tokens: float
    """Where the linear decay ends."""
    sequence_length: int = 2048
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    final_fraction: float = 0.1
    """The learning rate at the end of the decay, as a share of the peak."""
    source: str = ""


class ModelConfig(Spec):
    """The numbers of one model; a family's subclass adds its own, and the arithmetic."""

    family: ClassVar[str]
    causal: ClassVar[bool] = True
    """Whether a token sees only itself and what precedes it."""

    grown_by: ClassVar[str] = ""
    """The field that changes when a model of the family grows (`recipe.anytime.growEvery`); empty: none can."""

    vocabulary_size: PositiveInt
    maximum_positions: PositiveInt
    """The longest sequence the model can take."""
    layers: PositiveInt
    width: PositiveInt
    """Of the residual stream (the papers' d or h)."""
    dropout: float = Field(ge=0, lt=1)

    @property
    def grows(self) -> bool:
        """Whether this model can."""
        return bool(self.grown_by)

    @property
    def growths(self) -> int:
        """How often it has grown."""
        return 0

    def grown(self, times: int) -> Self:
        """As after so many times more; of what sizes and costs depend on, it makes no odds where. Raises ValueError
        where it cannot grow."""
        if times:
            raise ValueError(f"{self.family} cannot grow")
        return self

    @property
    def member(self) -> ModelConfig:
        """Of an ensemble one of its models; else the model itself."""
        return self

    @property
    def turns(self) -> int:
        """Of an ensemble the members that a step trains, one after the other; else 1."""
        return 1

    @property
    def trained_parameters(self) -> int:
        """Those with gradients and moments."""
        return self.turns * self.member.parameters().total

    @abstractmethod
    def parameters(self) -> ParameterCount:
        """Exact number of parameters."""

    @abstractmethod
    def block_parameters(self) -> int:
        """Parameters of the largest block: what full sharding gathers at a time."""

    def unit(self, index: int) -> Unit:
        """Parameters of block `index`, from 0."""
        return Unit(self.block_parameters())

    def tied_parameters(self) -> int:
        """Of the output layer: their gradient begins with the loss."""
        return self.vocabulary_size * self.width

    @abstractmethod
    def block_memory(self, index: int, one: Pass) -> BlockMemory:
        """Activations of block `index`, from 0."""

    @abstractmethod
    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        """Forward FLOPs of all blocks, per token."""

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        """What activation checkpointing runs a second time. torch stops recomputing a block when all that its backward
        pass needs is there, so a family whose block ends with a product leaves that out."""
        return self.block_flops_per_token(sequence_length, causal=causal)

    @abstractmethod
    def forward_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        """Forward FLOPs per token: matrix products only, a multiply-add counts 2, output layer in, table look-ups out.

        `causal`: attention counts the pairs that are attended, (T + 1) / 2 a token; False counts the full square T, as
        a kernel that masks after multiplying executes and as FlopCounterMode reports.
        """

    @abstractmethod
    def palm_flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token by 6N + 12·L·H·Q·T (PaLM, 2204.02311 appendix B): full square, for comparison with
        published MFU. N: parameters that multiply activations, so tables that are only looked up stay out."""

    def train_flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward (twice the forward), causal-exact, nothing recomputed: what `model_tflops` counts."""
        return 3 * self.forward_flops_per_token(sequence_length)

    def hardware_flops_per_token(self, sequence_length: int, *, activation_checkpointing: bool) -> float:
        """Training FLOPs per token including recomputed blocks: what `hfu` counts."""
        recomputed = self.recomputed_flops_per_token(sequence_length) if activation_checkpointing else 0.0
        return self.train_flops_per_token(sequence_length) + recomputed


@dataclass(frozen=True)
class Preset:
    name: str
    config: ModelConfig
    recipe: PublishedRecipe
    note: str = ""
