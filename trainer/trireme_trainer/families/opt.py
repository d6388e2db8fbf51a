"""OPT (arXiv 2205.01068 §2.1–2.2): a decoder with learned positions, tied embeddings and ReLU."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from trireme_api.families.opt import PAD_TOKEN, POSITION_OFFSET, OptConfig

from trireme_trainer.families.base import Head, LanguageModel
from trireme_trainer.layers.attention import SelfAttention, padding_mask
from trireme_trainer.layers.block import TransformerBlock
from trireme_trainer.layers.embedding import LearnedPositions
from trireme_trainer.layers.feed_forward import FeedForward
from trireme_trainer.layers.init import Constant, InitialValue, Normal


class OptModel(LanguageModel):
    """Embeddings are neither scaled nor dropped; the output layer is the token table, without a bias."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.config = config
        d, w = config.width, config.embedding_width
        self.embed_tokens = nn.Embedding(config.vocabulary_size, w, padding_idx=PAD_TOKEN)
        self.embed_positions = LearnedPositions(config.maximum_positions, d, POSITION_OFFSET)
        self.project_in = nn.Linear(w, d, bias=False) if config.projected else None
        self.blocks = nn.ModuleList(self._block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(d) if config.pre_norm else None
        self.project_out = nn.Linear(d, w, bias=False) if config.projected else None
        self._residual_std = config.initial_std / math.sqrt(2 * config.layers)
        self._initial_std = config.initial_std

    @staticmethod
    def _block(config: OptConfig) -> TransformerBlock:
        """LayerNorm before each sub-layer, or after each sum (released 350M)."""
        return TransformerBlock(
            config.width,
            SelfAttention(config.width, config.heads, config.attention_dropout, causal=True),
            FeedForward(config.width, config.feed_forward_width, "relu"),
            dropout=config.dropout,
            pre_norm=config.pre_norm,
        )

    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(tokens_BT)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        hidden = hidden + self.embed_positions(tokens_BT.shape[1], mask_BT)
        attend_B1TT = None if mask_BT is None else padding_mask(mask_BT, causal=True)
        for block in self.blocks:
            hidden = block(hidden, attend_B1TT)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.project(hidden) if head is None else head(hidden, self.project)

    def project(self, hidden: Tensor) -> Tensor:
        """[..., embedding width] → logits [..., V]."""
        return F.linear(hidden, self.embed_tokens.weight)

    def initial_value(self, name: str) -> InitialValue:
        """§2.2: N(0, 0.006²), output layers of both sub-layers narrower by √(2L), biases and padding rows zero."""
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        match leaf, kind:
            case ("attention_norm" | "feed_forward_norm" | "final_norm"), "weight":
                return Constant(1.0)
            case _, "bias":
                return Constant(0.0)
            case "embed_tokens", "weight":
                return Normal(self._initial_std, zero_row=PAD_TOKEN)
            case "embed_positions", "weight":
                return Normal(self._initial_std, zero_row=POSITION_OFFSET - 1)
            case ("out_proj" | "fc2"), "weight":
                return Normal(self._residual_std)
            case ("q_proj" | "k_proj" | "v_proj" | "fc1" | "project_in" | "project_out"), "weight":
                return Normal(self._initial_std)
        raise KeyError(f"OPT has no parameter named {name!r}")
