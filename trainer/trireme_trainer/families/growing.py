"""The gpt family with feed-forward layers that grow (arXiv 2106.09563); a reconstruction, see its configuration."""

from __future__ import annotations

from torch import nn
from trireme_api.families.gpt import GptConfig
from trireme_api.families.growing import GrowingConfig

from trireme_trainer.families.gpt import GptModel
from trireme_trainer.layers.attention import SelfAttention
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.init import InitialValue, torch_linear
from trireme_trainer.layers.soft_experts import SoftExperts


class GrowingModel(GptModel):
    def block(self, config: GptConfig, index: int) -> nn.Module:
        assert isinstance(config, GrowingConfig)
        attention = SelfAttention(config.width, config.heads, config.attention_dropout, causal=True)
        experts = SoftExperts(config.width, config.feed_forward_width, "gelu", config.trees()[index])
        return TransformerBlock(config.width, attention, experts, dropout=config.dropout)

    def initial_value(self, name: str) -> InitialValue:
        if ".feed_forward.gates." in name:
            return torch_linear(self._width)
        return super().initial_value(name)
