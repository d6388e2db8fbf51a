"""One training session: the model before, a fresh optimiser, the best epoch by the validation rows (2106.09563)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """Inputs and what is to be answered: one label a sample, or one a token."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, rows: Tensor) -> Data:
        return Data(self.inputs[rows], self.targets[rows])


def wrong_answers(scores: Tensor, targets: Tensor) -> float:
    """How many of `targets` [...] are not the class of the highest score, of `scores` [..., classes]."""
    return float((scores.argmax(-1) != targets).sum())


def nats(scores: Tensor, targets: Tensor) -> float:
    """Summed cross-entropy; for language models, which the paper judges by perplexity instead of errors."""
    return float(F.cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction="sum"))


@dataclass(frozen=True)
class Fit:
    """How a session trains. Defaults: the released code's for MNIST."""

    epochs: int = 100
    patience: int = 25
    """Epochs without a better one before the session ends."""
    delta: float = 1e-3
    """By how much of the validation targets an epoch must be better to count as such."""
    batch: int = 128
    errors: Callable[[Tensor, Tensor], float] = wrong_answers
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda parameters: torch.optim.Adadelta(
        parameters, lr=1.0
    )

    def __call__(self, model: nn.Module, train: Data, validation: Data, generator: torch.Generator) -> int:
        """Trains `model` in place and leaves it as its best epoch was; how many samples went forward in training."""
        optimizer = self.optimizer(list(model.parameters()))
        best, state, waited, seen = float("inf"), copy.deepcopy(model.state_dict()), 0, 0
        for _ in range(self.epochs):
            model.train()
            order = torch.randperm(len(train), generator=generator)
            for rows in torch.split(order, self.batch):
                chosen = train.rows(rows)
                loss = F.cross_entropy(model(chosen.inputs).flatten(0, -2), chosen.targets.flatten())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                seen += len(rows)
            model.eval()
            with torch.no_grad():
                share = self.errors(model(validation.inputs), validation.targets) / validation.targets.numel()
            if share < best - self.delta:
                best, waited, state = share, 0, copy.deepcopy(model.state_dict())
            else:
                waited += 1
                if waited >= self.patience:
                    break
        model.load_state_dict(state)
        model.eval()
        return seen
