"""Bytes of model state on one device under FSDP2: arithmetic, no measurement. Activations are not in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trireme_api.families.base import ModelConfig

Precision = Literal["fp32", "bf16", "fp16"]
Sharding = Literal["full", "hybrid", "grad-op"]

MASTER_BYTES = 4
"""Sharded weights, reduced gradients and both AdamW moments stay fp32 in every precision."""


def compute_bytes(precision: Precision) -> int:
    """Bytes of one gathered parameter."""
    return 4 if precision == "fp32" else 2


@dataclass(frozen=True)
class StateMemory:
    """Bytes per device. `gathered`: the most unsharded parameters that are alive at once."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


def weight_bytes(config: ModelConfig, shards: int = 1) -> int:
    """fp32 weights of one shard; the largest shard where they do not divide evenly."""
    return MASTER_BYTES * -(-config.parameters().total // shards)


def gradient_bytes(config: ModelConfig, shards: int = 1) -> int:
    """fp32 gradients of one shard after reduction."""
    return weight_bytes(config, shards)


def optimizer_bytes(config: ModelConfig, shards: int = 1) -> int:
    """AdamW: first and second moment, fp32."""
    return 2 * weight_bytes(config, shards)


def gathered_bytes(config: ModelConfig, shards: int, precision: Precision, sharding: Sharding) -> int:
    """Full and hybrid sharding hold two blocks (the one at work and the one prefetched) and what lies outside blocks;
    grad-op keeps everything from the forward pass to the backward. One shard in fp32 is the weight itself: nothing."""
    if shards == 1 and precision == "fp32":
        return 0
    total = config.parameters().total
    if sharding == "grad-op":
        alive = total
    else:
        outside = total - config.layers * config.block_parameters()
        alive = min(total, outside + 2 * config.block_parameters())
    return compute_bytes(precision) * alive


def state_memory(
    config: ModelConfig, *, shards: int, precision: Precision = "bf16", sharding: Sharding = "full"
) -> StateMemory:
    """`shards`: ranks one copy of the model is spread over: all of them for full and grad-op, a group for hybrid."""
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    return StateMemory(
        weights=weight_bytes(config, shards),
        gradients=gradient_bytes(config, shards),
        optimizer=optimizer_bytes(config, shards),
        gathered=gathered_bytes(config, shards, precision, sharding),
    )
