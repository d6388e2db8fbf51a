"""FLOPs of one trained token under a recipe: what the trainer meters and `trireme plan` expects."""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api.families.base import ModelConfig
from trireme_api.recipe import Recipe


@dataclass(frozen=True)
class TokenFlops:
    model: float
    """Forward and backward, causal attention exactly, experts that are activated."""
    hardware: float
    """And what activation checkpointing computes again."""
    palm: float
    """By 6N + 12·L·H·Q·T, for comparison with published MFU."""

    @classmethod
    def of(cls, config: ModelConfig, recipe: Recipe) -> TokenFlops:
        length = recipe.data.sequence_length
        palm = config.palm_flops_per_token(length)
        if recipe.objective == "few-shot":
            # Every token goes through the blocks once per pass, answers alone to the output layer: left out here.
            blocks = 3 * config.block_flops_per_token(length) * recipe.episodes.trained_share
            again = config.recomputed_flops_per_token(length) if recipe.activation_checkpointing else 0.0
            return cls(blocks, blocks + again * recipe.episodes.passes, palm * recipe.episodes.trained_share)
        # Of a masked model's tokens, those alone that are predicted reach the output layer.
        spared = 0.0
        if recipe.objective == "masked-lm":
            outer = config.forward_flops_per_token(length) - config.block_flops_per_token(length)
            spared = 3 * outer * (1 - recipe.masks.places(length) / length)
        checkpointing = recipe.activation_checkpointing
        return cls(
            model=config.train_flops_per_token(length) - spared,
            hardware=config.hardware_flops_per_token(length, activation_checkpointing=checkpointing) - spared,
            palm=palm - spared,
        )
