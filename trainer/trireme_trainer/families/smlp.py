"""Sparse all-MLP (arXiv 2203.06850); a reconstruction, see its configuration."""

from __future__ import annotations

from torch import Tensor, nn
from trireme_api.families.gmlp import GmlpConfig
from trireme_api.families.smlp import SmlpConfig

from trireme_trainer.families.gmlp import GmlpModel
from trireme_trainer.families.mixture import initial_value_of_mixture, mean_figures, mixture
from trireme_trainer.layers.init import InitialValue, torch_linear
from trireme_trainer.layers.spatial import GatingBlock, SpatialGating


class SmlpModel(GmlpModel):
    config: SmlpConfig

    def block(self, config: GmlpConfig, index: int) -> nn.Module:
        """Dense blocks are gMLP's; the last ones are sparse: sMoE, then tMoE."""
        assert isinstance(config, SmlpConfig)
        if index < config.layers - config.sparse_layers:
            return super().block(config, index)
        gating = SpatialGating(
            config.width, config.inner_width, config.maximum_positions, config.spatial_experts, prefix=config.prefix,
            balance_weight=config.gate_loss_weight,
        )  # fmt: skip
        return GatingBlock(config.width, gating, dropout=config.dropout, feed_forward=mixture(config))

    def figures(self) -> dict[str, Tensor]:
        return mean_figures(self)

    def initial_value(self, name: str) -> InitialValue:
        if name.endswith(".spatial_gate.weight"):
            return torch_linear(self.config.gated_width // self.config.spatial_experts)
        return initial_value_of_mixture(name, self.config) or super().initial_value(name)
