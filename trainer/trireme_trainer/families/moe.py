"""Mixture-of-experts language models (arXiv 2112.10684): GPT blocks, every second with experts."""

from __future__ import annotations

from torch import Tensor, nn
from trireme_api.families.gpt import GptConfig
from trireme_api.families.moe import MoeConfig

from trireme_trainer.families.base import Head
from trireme_trainer.families.gpt import GptModel
from trireme_trainer.families.mixture import initial_value_of_mixture, mean_figures, mixture
from trireme_trainer.layers.attention import SelfAttention
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.init import InitialValue
from trireme_trainer.layers.routing import tell_tokens


class MoeModel(GptModel):
    config: MoeConfig

    def block(self, config: GptConfig, index: int) -> nn.Module:
        assert isinstance(config, MoeConfig)
        if (index + 1) % config.moe_every:
            return super().block(config, index)
        attention = SelfAttention(config.width, config.heads, config.attention_dropout, causal=True)
        return TransformerBlock(config.width, attention, mixture(config), dropout=config.dropout)

    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        tell_tokens(self, tokens_BT)
        return super().forward(tokens_BT, head, mask_BT)

    def figures(self) -> dict[str, Tensor]:
        return mean_figures(self)

    def initial_value(self, name: str) -> InitialValue:
        return initial_value_of_mixture(name, self.config) or super().initial_value(name)
