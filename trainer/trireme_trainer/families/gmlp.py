"""gMLP (arXiv 2105.08050) as a causal language model; a reconstruction, see its configuration."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from trireme_api.families.gmlp import GmlpConfig
from trireme_api.families.transformer import PAD_TOKEN

from trireme_trainer.families.base import Head, LanguageModel
from trireme_trainer.layers.init import Constant, InitialValue, Normal, Uniform, torch_linear
from trireme_trainer.layers.routing import tell_tokens
from trireme_trainer.layers.spatial import GatingBlock, SpatialGating


class GmlpModel(LanguageModel):
    """Scaled embeddings are dropped; positions are the spatial matrices' alone; the output layer is the token table."""

    def __init__(self, config: GmlpConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.width, padding_idx=PAD_TOKEN)
        self.blocks = nn.ModuleList(self.block(config, index) for index in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self._width, self._half, self._dropout = config.width, config.gated_width, config.dropout

    def block(self, config: GmlpConfig, index: int) -> nn.Module:
        """Block `index`, from 0; what families that differ in their blocks alone replace."""
        gating = SpatialGating(config.width, config.inner_width, config.maximum_positions)
        return GatingBlock(config.width, gating, dropout=config.dropout)

    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        # Padding goes behind, where no position looks, and its place is given back at the end.
        order_BT = None if mask_BT is None else (mask_BT == 0).long().argsort(dim=1, stable=True)
        if order_BT is not None:
            tokens_BT = tokens_BT.gather(1, order_BT)
        tell_tokens(self, tokens_BT)
        hidden = F.dropout(self.embed_tokens(tokens_BT) * math.sqrt(self._width), self._dropout, self.training)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.final_norm(hidden)
        if order_BT is not None:
            hidden = hidden.gather(1, order_BT.argsort(dim=1)[..., None].expand_as(hidden))
        return self.project(hidden) if head is None else head(hidden, self.project)

    def project(self, hidden: Tensor) -> Tensor:
        """[..., width] → logits [..., V]."""
        return F.linear(hidden, self.embed_tokens.weight)

    def initial_value(self, name: str) -> InitialValue:
        """Spatial matrices next to zero and biases 1: a block starts as a feed-forward layer. Token table and linear
        layers as gpt's."""
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        match leaf, kind:
            case ("gating_norm" | "spatial_norm" | "feed_forward_norm" | "final_norm"), _:
                return Constant(1.0 if kind == "weight" else 0.0)
            case "embed_tokens", "weight":
                return Normal(self._width**-0.5, zero_row=PAD_TOKEN)
            case "gating", "spatial_weight":
                return Uniform(1e-3 / self.config.maximum_positions)
            case "gating", "spatial_bias":
                return Constant(1.0)
            case "fc1", _:
                return torch_linear(self._width)
            case "fc2", _:
                return torch_linear(self._half)
        raise KeyError(f"{self.config.family} has no parameter named {name!r}")
