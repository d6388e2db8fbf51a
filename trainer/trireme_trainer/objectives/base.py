"""What the training loop expects of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from trireme_trainer.data.batches import Batch, Batches
from trireme_trainer.families import LanguageModel


class Samples(Protocol):
    """What is trained on, as far as checkpoints need to know."""

    vocabulary_size: int
    tokenizer: str | None
    """sha256 of the file it was made with; None: with none."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides order and content of samples; plain JSON."""

    def changes_since(self, saved: dict[str, Any]) -> list[str]:
        """How this differs from an `identity` kept earlier, one line each."""


class Objective(ABC):
    """From a micro-batch to gradients. Holds whatever the objective learns beside the model."""

    passes = 1
    """Forward and backward passes that `learn` makes per micro-batch, the same on every rank."""
    samples: Samples

    @abstractmethod
    def batches(self, rank: int, world: int, pin_memory: bool) -> Batches:
        """This rank's share of each step."""

    @abstractmethod
    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        """Adds this micro-batch's gradients to the model's, times `scale` where there is one (fp16). Returns its share
        of the step's loss, [], fp32, detached and without `scale`. `valid`: valid targets of the global step, [].
        `before_pass` is called before each of the `passes` forward passes."""

    def told(self) -> list[dict[str, Any]]:
        """What is trained on, a row for each source: for the step log."""
        return []

    def trained_tokens(self, valid: float) -> float:
        """Tokens of a step that figures count, of a step with `valid` valid targets."""
        return valid

    def after_step(self, skip: Tensor) -> None:  # noqa: B027
        """After the optimiser's step; `skip` ([], 1.0 or 0.0): whether that changed nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it learned beside the model, the live tensors, equal on every rank; loading writes in place."""
        return {}

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of it beside its samples, to evaluate it by; plain JSON."""
        return {}

    def reset(self) -> None:  # noqa: B027
        """Back to what it began with."""

    def due(self, step: int, last: bool) -> bool:
        """Whether `evaluate` has something to tell after `step` steps."""
        return False

    def evaluate(self, model: LanguageModel, alive: Callable[[], None]) -> dict[str, Any]:
        """Figures for the step log. Collective. `alive` is called now and then, for the hang watch."""
        return {}
