"""The learners of 2106.09563: a single model, a fixed ensemble, a growing ensemble, a growing mixture of experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from trireme_trainer.anytime.growth import grow, mixtures
from trireme_trainer.anytime.metrics import count_parameters, forward_flops
from trireme_trainer.anytime.session import Data, Fit

Make = Callable[[torch.Generator], nn.Module]
"""A model with initial values drawn from the generator."""


class Learner(Protocol):
    """What answers after each mega-batch. Before its first session it answers as it was initialised."""

    def train(self, number: int, train: Data, validation: Data) -> float:
        """Session `number` (from 1), capacity grown first where it is due; forward FLOPs that it cost."""

    def scores(self, inputs: Tensor) -> Tensor:
        """[samples, ...] → [samples, ..., classes], without gradient."""

    @property
    def parameters(self) -> int: ...


def generator(*key: int) -> torch.Generator:
    """Random numbers of their own for (seed, what, number)."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % 2**62
    return torch.Generator().manual_seed(seed)


class Single:
    """One model, trained on from where the session before left it."""

    def __init__(self, make: Make, fit: Fit, seed: int, member: int = 0) -> None:
        self._key, self._fit = (seed, member), fit
        self.model = make(generator(*self._key, 0)).eval()

    def train(self, number: int, train: Data, validation: Data) -> float:
        cost = forward_flops(self.model, train.inputs[:1])
        return cost * self._fit(self.model, train, validation, generator(*self._key, number, 1))

    @torch.no_grad()
    def scores(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model(inputs)
        return out

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)


class Ensemble:
    """k models with initial values and shuffles of their own; their probabilities averaged (`KEnsemble`)."""

    def __init__(self, make: Make, fit: Fit, seed: int, members: int = 3) -> None:
        if members < 1:
            raise ValueError(f"members: {members}; an ensemble has at least 1")
        self.members = [Single(make, fit, seed, member) for member in range(members)]

    def train(self, number: int, train: Data, validation: Data) -> float:
        return sum(member.train(number, train, validation) for member in self.members)

    def scores(self, inputs: Tensor) -> Tensor:
        likely = [member.scores(inputs).softmax(-1) for member in self.members]
        return torch.stack(likely).mean(0).log()

    @property
    def parameters(self) -> int:
        return sum(member.parameters for member in self.members)


class GrowingEnsemble:
    """Each session copies the newest model, trains the copy and adds it; logits averaged (gEns, `Ensemble`).

    The first session trains the initial model itself, which is no member worth keeping (ours).
    """

    def __init__(self, make: Make, fit: Fit, seed: int) -> None:
        self._seed, self._fit = seed, fit
        self.members = [make(generator(seed, 0, 0)).eval()]

    def train(self, number: int, train: Data, validation: Data) -> float:
        if number > 1:
            self.members.append(copy.deepcopy(self.members[-1]))
        newest = self.members[-1]
        cost = forward_flops(newest, train.inputs[:1])
        return cost * self._fit(newest, train, validation, generator(self._seed, 0, number, 1))

    @torch.no_grad()
    def scores(self, inputs: Tensor) -> Tensor:
        return torch.stack([member(inputs) for member in self.members]).mean(0)

    @property
    def parameters(self) -> int:
        return sum(count_parameters(member) for member in self.members)


class GrowingMixture(Single):
    """A mixture of experts whose most used experts, one of each layer, are split before every `every`-th session
    after the first (gMoE, `Finetune_Grow`).

    Usage is measured on the session's validation rows, as in the released code.
    """

    def __init__(self, make: Make, fit: Fit, seed: int, every: int = 1) -> None:
        super().__init__(make, fit, seed)
        if every < 1:
            raise ValueError(f"every: {every}; a mixture grows every 1 or more sessions")
        if not mixtures(self.model):
            raise ValueError("make: the model has no layer that can grow; wrap its layers in Mixture")
        self._every = every

    def train(self, number: int, train: Data, validation: Data) -> float:
        if number > 1 and (number - 1) % self._every == 0:
            grow(self.model, [validation.inputs], generator(*self._key, number, 2))
        return super().train(number, train, validation)
