"""The perceptron of the released code's MNIST runs, plain or with layers that can grow."""

from __future__ import annotations

import torch
from torch import nn

from trireme_trainer.anytime.growth import Mixture


def perceptron(inputs: int, width: int, classes: int, random: torch.Generator, *, grows: bool = False) -> nn.Sequential:
    """Two hidden layers of `width` with ReLU. `grows` makes each of them a Mixture; the initial function is the same.

    Initial values: those of nn.Linear, drawn from `random`.
    """
    layers: list[nn.Module] = []
    for size, out in ((inputs, width), (width, width)):
        hidden = nn.Sequential(_linear(size, out, random), nn.ReLU())
        layers.append(Mixture(hidden, size) if grows else hidden)
    return nn.Sequential(*layers, _linear(width, classes, random))


def _linear(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=random)
    return layer
