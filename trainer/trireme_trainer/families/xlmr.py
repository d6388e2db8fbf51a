"""XLM-R XL and XXL (arXiv 2105.00572 §2; fairseq's `roberta_prenorm`): an encoder that sees both sides of a token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from trireme_api.families.transformer import PAD_TOKEN, POSITION_OFFSET
from trireme_api.families.xlmr import XlmrConfig

from trireme_trainer.families.base import Head, LanguageModel
from trireme_trainer.layers.attention import SelfAttention, padding_mask
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.embedding import LearnedPositions
from trireme_trainer.layers.feed_forward import FeedForward
from trireme_trainer.layers.init import Constant, InitialValue, Normal


class XlmrModel(LanguageModel):
    """The sum of tokens, positions and the one segment is dropped. Dropout follows each sub-layer, as in fairseq; the
    Transformers model leaves out the one after the feed-forward layer."""

    def __init__(self, config: XlmrConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.embed_tokens = nn.Embedding(config.vocabulary_size, d, padding_idx=PAD_TOKEN)
        self.embed_positions = LearnedPositions(config.maximum_positions, d, POSITION_OFFSET)
        # Transformers keeps a table of segments with one row, fairseq none: zero at first, they are the same.
        self.embed_segments = nn.Embedding(1, d)
        self.blocks = nn.ModuleList(self.block(config, index) for index in range(config.layers))
        self.final_norm = nn.LayerNorm(d)
        self.head_dense = nn.Linear(d, d)
        self.head_norm = nn.LayerNorm(d)
        self.head_bias = nn.Parameter(self.embed_tokens.weight.new_empty(config.vocabulary_size))
        self._dropout, self._initial_std = config.dropout, config.initial_std

    def block(self, config: XlmrConfig, index: int) -> nn.Module:
        """Block `index`, from 0; what families that differ in their blocks alone replace."""
        return TransformerBlock(
            config.width,
            SelfAttention(config.width, config.heads, config.attention_dropout, causal=False),
            FeedForward(config.width, config.feed_forward_width, "gelu"),
            dropout=config.dropout,
        )

    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(tokens_BT) + self.embed_segments.weight[0]
        hidden = hidden + self.embed_positions(tokens_BT.shape[1], mask_BT)
        hidden = F.dropout(hidden, self._dropout, self.training)
        attend_B1TT = None if mask_BT is None else padding_mask(mask_BT, causal=False)
        for block in self.blocks:
            hidden = block(hidden, attend_B1TT)
        hidden = self.final_norm(hidden)
        return self.project(hidden) if head is None else head(hidden, self.project)

    def project(self, hidden: Tensor) -> Tensor:
        """[..., width] → logits [..., V]."""
        hidden = self.head_norm(F.gelu(self.head_dense(hidden)))
        return F.linear(hidden, self.embed_tokens.weight, self.head_bias)

    def initial_value(self, name: str) -> InitialValue:
        """fairseq's `init_bert_params`: N(0, 0.02²), biases and the padding row zero."""
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        match leaf, kind:
            case ("attention_norm" | "feed_forward_norm" | "final_norm" | "head_norm"), "weight":
                return Constant(1.0)
            case ("embed_segments", "weight") | (_, "bias" | "head_bias"):
                return Constant(0.0)
            case "embed_tokens", "weight":
                return Normal(self._initial_std, zero_row=PAD_TOKEN)
            case "embed_positions", "weight":
                return Normal(self._initial_std, zero_row=POSITION_OFFSET - 1)
            case ("q_proj" | "k_proj" | "v_proj" | "out_proj" | "fc1" | "fc2" | "head_dense"), "weight":
                return Normal(self._initial_std)
        raise KeyError(f"{self.config.family} has no parameter named {name!r}")
