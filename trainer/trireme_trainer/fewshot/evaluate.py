"""How well a task that was never trained on is learned from k examples: only its embedding is fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trireme_trainer.families import LanguageModel, Project
from trireme_trainer.fewshot.embedding import task_token
from trireme_trainer.fewshot.episodes import Episodes, tensors
from trireme_trainer.fewshot.inner import adapt
from trireme_trainer.fewshot.tasks import IGNORED


@dataclass(frozen=True)
class Few:
    shots: int
    """Examples to adapt with; 0: none, the embedding it begins with."""
    steps: int
    learning_rate: float
    queries: int
    draw: int = 0
    """Which examples; another number draws others."""


def few_shot(model: LanguageModel, episodes: Episodes, task: int, begin_D: Tensor, how: Few) -> Tensor:
    """Adapts, then predicts the task's queries: [3], float64 on the host: answer tokens right, answer tokens, summed
    cross-entropy. Answers are fed as they should be (teacher forcing); e^(loss ÷ tokens) is the perplexity."""
    z_D = begin_D
    device = begin_D.device
    if how.shots:
        support = tensors(episodes.support(task, how.shots, how.draw))
        tokens, targets = (part.to(device) for part in support)
        z_D = adapt(model, tokens, targets, begin_D, steps=how.steps, learning_rate=how.learning_rate)
    tokens, targets = (part.to(device) for part in tensors(episodes.queries(task, how.queries)))
    return score(model, tokens, targets, z_D)


@torch.no_grad()
def score(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, z_D: Tensor) -> Tensor:
    """[3], float64, on the host: answer tokens right, answer tokens, summed cross-entropy."""

    def head(hidden_BTD: Tensor, project: Project) -> Tensor:
        asked_BT = targets_BT != IGNORED
        logits_NV, answers_N = project(hidden_BTD[asked_BT]).float(), targets_BT[asked_BT]
        right = (logits_NV.argmax(-1) == answers_N).sum()
        loss = torch.nn.functional.cross_entropy(logits_NV, answers_N, reduction="sum")
        return torch.stack([right.double(), torch.tensor(float(len(answers_N)), device=right.device), loss.double()])

    with task_token(model, z_D[None].expand(len(tokens_BT), -1)):
        out: Tensor = model(tokens_BT, head)
    return out.double().cpu()
