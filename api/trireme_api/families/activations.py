"""What a block keeps of each token between its forward and its backward pass: what memory is counted with.

Counted on this project's own layers: a tensor is kept when a backward pass asks for it (a product's inputs, a norm's
input, an activation's input or result, a mask of what dropout left).
"""

from __future__ import annotations

from dataclasses import dataclass

SINGLE = 4


@dataclass(frozen=True)
class Pass:
    """One micro-batch on its way through the model."""

    tokens: int
    length: int
    """Of a sequence."""
    value_bytes: int
    """Of one number of the type that is computed in."""
    mask_bytes: int = 1
    """Of what dropout keeps for each number: CUDA a byte, the CPU the factor itself."""
    fused_dropout: bool = True
    """Whether attention's kernel takes dropout; on the CPU it does not, and whole score matrices are kept instead."""
    tensor: int = 1
    """Ranks that divide heads, inner channels and experts."""


@dataclass(frozen=True)
class PerToken:
    """Counts per token; `single` are fp32 in every precision."""

    values: float = 0.0
    masks: float = 0.0
    single: float = 0.0

    def __add__(self, other: PerToken) -> PerToken:
        return PerToken(self.values + other.values, self.masks + other.masks, self.single + other.single)

    def __mul__(self, factor: float) -> PerToken:
        return PerToken(self.values * factor, self.masks * factor, self.single * factor)

    def bytes(self, one: Pass) -> float:
        """Of all tokens of the micro-batch."""
        each = self.values * one.value_bytes + self.masks * one.mask_bytes + self.single * SINGLE
        return one.tokens * each


@dataclass(frozen=True)
class BlockMemory:
    kept: PerToken
    """From the forward pass to the backward pass of this block."""
    work: PerToken
    """The most that its backward pass holds at once beyond that."""
    weight_gradients: int
    """Parameters whose gradient is there at that moment."""


@dataclass(frozen=True)
class Unit:
    """Parameters of one block, as sharding sees them."""

    shared: int
    """Gathered over all ranks of a shard group."""
    routed: int = 0
    """Of experts, which expert or tensor parallelism shares out first."""
    undivided: int = 0
    """Of the shared ones, those that every rank of a tensor group has: norms, gates, biases of projections back."""

    def gathered(self, tensor: int) -> int:
        """Of the shared ones, those a rank has when they are gathered."""
        return (self.shared - self.undivided) // tensor + self.undivided

    def gathered_experts(self, experts: int, tensor: int) -> int:
        """Of the routed ones."""
        return self.routed // (experts * tensor)

    def kept(self, shards: int, tensor: int) -> float:
        """That a rank keeps of all, of `shards` ranks with one copy of the model."""
        return (self.shared + self.routed + (tensor - 1) * self.undivided) / shards
