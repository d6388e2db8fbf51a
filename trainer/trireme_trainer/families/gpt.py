"""The dense decoders of arXiv 2112.10684 as fairseq builds them (`transformer_lm_gpt`): fixed sinusoidal positions,
token table scaled by √width, GELU, pre-LN."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from trireme_api.families.gpt import GptConfig
from trireme_api.families.transformer import PAD_TOKEN, POSITION_OFFSET

from trireme_trainer.families.base import Head, LanguageModel
from trireme_trainer.layers.attention import SelfAttention, padding_mask
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.embedding import SinusoidalPositions
from trireme_trainer.layers.feed_forward import FeedForward
from trireme_trainer.layers.init import Constant, InitialValue, Normal, torch_linear, xavier_uniform


class GptModel(LanguageModel):
    """The sum of scaled embeddings and positions is dropped; the output layer is the token table, without a bias."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.embed_tokens = nn.Embedding(config.vocabulary_size, d, padding_idx=PAD_TOKEN)
        self.embed_positions = SinusoidalPositions(config.maximum_positions, d, POSITION_OFFSET)
        self.blocks = nn.ModuleList(self.block(config, index) for index in range(config.layers))
        self.final_norm = nn.LayerNorm(d)
        self._width, self._inner, self._dropout = d, config.feed_forward_width, config.dropout

    def block(self, config: GptConfig, index: int) -> nn.Module:
        """Block `index`, from 0; what families that differ in their blocks alone replace."""
        return TransformerBlock(
            config.width,
            SelfAttention(config.width, config.heads, config.attention_dropout, causal=True),
            FeedForward(config.width, config.feed_forward_width, "gelu"),
            dropout=config.dropout,
        )

    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(tokens_BT) * math.sqrt(self._width)
        positions = self.embed_positions(tokens_BT.shape[1], tokens_BT.device, mask_BT)
        hidden = F.dropout(hidden + positions.to(hidden.dtype), self._dropout, self.training)
        attend_B1TT = None if mask_BT is None else padding_mask(mask_BT, causal=True)
        for block in self.blocks:
            hidden = block(hidden, attend_B1TT)
        hidden = self.final_norm(hidden)
        return self.project(hidden) if head is None else head(hidden, self.project)

    def project(self, hidden: Tensor) -> Tensor:
        """[..., width] → logits [..., V]."""
        return F.linear(hidden, self.embed_tokens.weight)

    def initial_value(self, name: str) -> InitialValue:
        """fairseq's: modules/transformer_layer.py, modules/multihead_attention.py. Feed-forward layers and the biases
        of queries, keys and values keep what torch gives a linear layer."""
        d = self._width
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        match leaf, kind:
            case ("attention_norm" | "feed_forward_norm" | "final_norm"), "weight":
                return Constant(1.0)
            case ("attention_norm" | "feed_forward_norm" | "final_norm" | "out_proj"), "bias":
                return Constant(0.0)
            case "embed_tokens", "weight":
                return Normal(d**-0.5, zero_row=PAD_TOKEN)
            case ("q_proj" | "k_proj" | "v_proj"), "weight":
                return xavier_uniform(d, d, gain=1 / math.sqrt(2))
            case "out_proj", "weight":
                return xavier_uniform(d, d)
            case ("q_proj" | "k_proj" | "v_proj" | "fc1"), _:
                return torch_linear(d)
            case "fc2", _:
                return torch_linear(self._inner)
        raise KeyError(f"{self.config.family} has no parameter named {name!r}")
