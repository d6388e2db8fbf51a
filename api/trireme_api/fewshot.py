"""Few-shot learning by a task's embedding (TAM, arXiv 2012.09543): what a recipe says about it.

A reconstruction: the paper was read through its abstract and a summary; no code of it is public. Where those leave a
choice open, the field says that the choice is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trireme_api.schema import PositiveFloat, PositiveInt, Spec

TASKS_SCHEME = "tasks://"
TASKS = ("classification", "transduction", "path-finding")
"""Kinds of generated tasks (the paper's three, §4; generators are ours)."""


def tasks_of(path: str) -> str | None:
    """NAME of tasks://NAME; None for another path. Raises ValueError for a name that is not one of `TASKS`."""
    if not path.startswith(TASKS_SCHEME):
        return None
    name = path.removeprefix(TASKS_SCHEME)
    if name not in TASKS:
        raise ValueError(f"data.sources: no tasks are called {name!r}; known: {', '.join(TASKS)}")
    return name


def most_answers(tasks: str, sequence_length: int) -> int:
    """Answer tokens of the longest row of a family: a label; as many symbols as the prompt has; from one corner of the
    grid to the other, and the end."""
    match tasks:
        case "classification":
            return 1
        case "transduction":
            return (sequence_length - 1) // 2
    return 2 * ((sequence_length - 2) // 2) - 1


class FewShotSpec(Spec):
    examples: PositiveInt = 20
    """Labelled examples of one task in one step; batch.tokens ÷ (examples · sequenceLength) tasks make a step."""
    inner_steps: int = Field(default=4, ge=0)
    """Steps on the task's embedding, weights held, between two steps on the weights (our default). 0, with `outerGrad:
    final`: embeddings stay what they begin with."""
    inner_learning_rate: PositiveFloat = 1.0
    """Of those steps, plain gradient descent on the mean loss per answer token, in training and afterwards (ours)."""
    outer_grad: Literal["accumulate", "final"] = "accumulate"
    """Gradient for the weights, first order either way. accumulate: summed over the inner steps, each at the embedding
    it began with (Algorithm 1 as summarised). final: at the embedding after the last one alone."""
    embedding: Literal["reset", "persist", "compositional"] = "reset"
    """What a task's embedding begins with. reset: zero, as for an unseen task. persist: what the same task ended with
    when it was last seen. compositional: the sum of its primitives' embeddings, which persist and are shared by tasks
    (the paper's compositional task descriptors)."""
    held_out_tasks: PositiveInt = 20
    """Tasks never trained on, for evaluation."""
    shots: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 5, 10, 20], min_length=1, max_length=16)
    """Numbers of examples that evaluation adapts with; 0: the embedding it begins with."""
    draws: PositiveInt = 1
    """Times those examples are drawn; figures are means over them."""
    adaptation_steps: PositiveInt = 20
    """Steps on the embedding of an unseen task (our default)."""
    queries: PositiveInt = 50
    """Examples of each held-out task that evaluation predicts."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations; left out: after the last step alone."""

    @model_validator(mode="after")
    def _learns(self) -> FewShotSpec:
        if self.inner_steps == 0 and self.outer_grad == "accumulate":
            raise ValueError("innerSteps: 0 leaves no gradient to accumulate; give 1 or more, or outerGrad: final")
        return self

    @property
    def passes(self) -> int:
        """Forward passes of one step over its examples."""
        return self.inner_steps + (self.outer_grad == "final")

    @property
    def weight_passes(self) -> int:
        """Of these, those whose backward pass reaches the weights."""
        return self.inner_steps if self.outer_grad == "accumulate" else 1

    @property
    def trained_share(self) -> float:
        """Model FLOPs of a step, in passes of training (forward, and backward to weights and activations): a pass for
        the embedding's gradient alone leaves out the weights' third."""
        return self.inner_steps if self.outer_grad == "accumulate" else self.inner_steps * 2 / 3 + 1


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Figures of an evaluation on unseen tasks, as the step log has them, a line for each number of examples."""
    rows = zip(found["shots"], found["accuracy"], found["answerLoss"], strict=True)
    return [
        f"{found['tasks']}, {found['heldOut']} unseen tasks, {shots} example{'' if shots == 1 else 's'}: "
        f"{100 * accuracy:.1f} % of answer tokens right, {nats:.4f} nats each"
        for shots, accuracy, nats in rows
    ]
