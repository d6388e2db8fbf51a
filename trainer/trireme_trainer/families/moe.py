"""Mixture-of-experts language models (arXiv 2112.10684): GPT blocks, every second with experts."""

from __future__ import annotations

import math

from torch import Tensor, nn
from trireme_api.families.moe import MoeConfig

from trireme_trainer.families.gpt import GptModel
from trireme_trainer.layers.attention import SelfAttention
from trireme_trainer.layers.auxiliary import mean_of
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.experts import MixtureOfExperts
from trireme_trainer.layers.init import InitialValue, torch_linear


class MoeModel(GptModel):
    def __init__(self, config: MoeConfig) -> None:
        super().__init__(config)

    def block(self, config: MoeConfig, index: int) -> nn.Module:  # type: ignore[override]
        if (index + 1) % config.moe_every:
            return super().block(config, index)
        mixture = MixtureOfExperts(
            config.width,
            config.feed_forward_width,
            config.experts,
            "gelu",
            capacity=config.capacity,
            capacity_factor=config.capacity_factor,
            evaluation_capacity=config.evaluation_capacity,
            balance_weight=config.gate_loss_weight,
            gradient_scale=math.sqrt(config.experts) if config.expert_gradients == "root" else 1.0,
        )
        attention = SelfAttention(config.width, config.heads, config.attention_dropout, causal=True)
        return TransformerBlock(config.width, attention, mixture, dropout=config.dropout)

    def figures(self) -> dict[str, Tensor]:
        return mean_of([m.figures for m in self.modules() if isinstance(m, MixtureOfExperts)])

    def initial_value(self, name: str) -> InitialValue:
        """Experts and gates start as torch's linear layers do, as in fairseq; each expert has values of its own."""
        leaf = name.rpartition("feed_forward.")[2]
        match leaf:
            case "gate.weight" | "experts.fc1_weight" | "experts.fc1_bias":
                return torch_linear(self._width)
            case "experts.fc2_weight" | "experts.fc2_bias":
                return torch_linear(self._inner)
        return super().initial_value(name)
