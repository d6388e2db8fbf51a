"""What anytime learning is judged by: error, memory and compute, summed over the whole stream (2106.09563)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trireme_trainer.layers.mode import evaluating


@dataclass(frozen=True)
class Moment:
    """After one mega-batch has arrived: the model that serves, whether it was trained just now or is the one before."""

    errors: float
    """On the whole test set: wrong answers, or for a language model the summed loss in nats."""
    parameters: int
    flops: float
    """Forward FLOPs of the training since the mega-batch before; 0 while waiting."""


@dataclass(frozen=True)
class Course:
    """A whole stream, and its sums."""

    moments: Sequence[Moment]
    test_size: int

    @property
    def errors(self) -> float:
        """Σ_t errors(model_t): the cumulative error (CER) as the released code counts it."""
        return sum(moment.errors for moment in self.moments)

    @property
    def error_rate(self) -> float:
        """The cumulative error per mega-batch and test sample: of wrong answers, 0 to 1."""
        return self.errors / (len(self.moments) * self.test_size)

    @property
    def final_error_rate(self) -> float:
        return self.moments[-1].errors / self.test_size

    @property
    def memory(self) -> int:
        """Σ_t parameters of model_t."""
        return sum(moment.parameters for moment in self.moments)

    @property
    def flops(self) -> float:
        """Σ_t forward FLOPs of training, a multiply and an add counted as two. The released code, too, counts forward
        passes of training samples alone (but a multiply-add as one); with backward passes it is three times this."""
        return sum(moment.flops for moment in self.moments)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops(model: nn.Module, inputs: Tensor) -> float:
    """Per sample of `inputs`: matrix products and convolutions, a multiply-add as two."""
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    return float(counter.get_total_flops()) / len(inputs)
