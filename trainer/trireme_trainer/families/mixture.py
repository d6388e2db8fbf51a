"""What families with mixtures of experts share: how one is built from its numbers, and starts."""

from __future__ import annotations

import math

from torch import Tensor, nn
from trireme_api.families.mixture import MixtureConfig

from trireme_trainer.layers.auxiliary import mean_of
from trireme_trainer.layers.experts import MixtureOfExperts
from trireme_trainer.layers.init import Constant, InitialValue, Normal, torch_linear


def mixture(config: MixtureConfig) -> MixtureOfExperts:
    return MixtureOfExperts(
        config.width,
        config.feed_forward_width,
        config.experts,
        "gelu",
        capacity=config.capacity,
        capacity_factor=config.capacity_factor,
        evaluation_capacity=config.evaluation_capacity,
        balance_weight=config.gate_loss_weight,
        gradient_scale=math.sqrt(config.experts) if config.expert_gradients == "root" else 1.0,
        router=config.router,
    )


def mean_figures(model: nn.Module) -> dict[str, Tensor]:
    """Over the mixtures of `model`."""
    return mean_of([part.figures for part in model.modules() if isinstance(part, MixtureOfExperts)])


def initial_value_of_mixture(name: str, config: MixtureConfig) -> InitialValue | None:
    """Experts and gates start as torch's linear layers do, as in fairseq; each expert has values of its own. None for
    what is no parameter of a mixture.

    BASE (fairseq modules/base_layer.py): an expert's second matrix starts at zero, and centroids are orthogonal with
    length 0.1. Here they are normal with that length, orthogonal as far as so many directions are: each row is a
    function of the seed and its name alone.
    """
    base = config.router == "base"
    match name.rpartition("feed_forward.")[2]:
        case "gate.weight" if base:
            return Normal(0.1 / math.sqrt(config.width))
        case "experts.fc2_weight" if base:
            return Constant(0.0)
        case "gate.weight" | "experts.fc1_weight" | "experts.fc1_bias":
            return torch_linear(config.width)
        case "experts.fc2_weight" | "experts.fc2_bias":
            return torch_linear(config.feed_forward_width)
    return None
