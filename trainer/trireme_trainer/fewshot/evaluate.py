"""How well tasks that were never trained on are learned from k examples: only their embeddings are fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trireme_trainer.families import LanguageModel, Project
from trireme_trainer.fewshot.embedding import task_token
from trireme_trainer.fewshot.episodes import Episodes
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


def few_shot(model: LanguageModel, episodes: Episodes, tasks: list[int], begin_ED: Tensor, how: Few) -> Tensor:
    """Adapts to each task, then predicts its queries: [tasks, 3] as `counts` has it. Answers are fed as they should be
    (teacher forcing); e^(loss ÷ tokens) is the perplexity."""
    z_ED, device = begin_ED, begin_ED.device
    if how.shots:
        tokens, targets = episodes.supports(tasks, how.shots, how.draw, device)
        z_ED = adapt(model, tokens, targets, begin_ED, steps=how.steps, learning_rate=how.learning_rate)
    tokens, targets = episodes.all_queries(tasks, how.queries, device)
    return score(model, tokens, targets, z_ED)


@torch.no_grad()
def score(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, z_ED: Tensor) -> Tensor:
    """[tasks, 3] as `counts` has it; rows are [tasks · examples]."""

    def head(hidden_BTD: Tensor, project: Project) -> Tensor:
        asked_BT = targets_BT != IGNORED
        return counts(project(hidden_BTD[asked_BT]).float().log_softmax(-1), targets_BT, len(z_ED))

    with task_token(model, z_ED.repeat_interleave(len(tokens_BT) // len(z_ED), dim=0)):
        out: Tensor = model(tokens_BT, head)
    return out.cpu()


def counts(log_p_NV: Tensor, targets_BT: Tensor, tasks: int) -> Tensor:
    """By task, [tasks, 3], float64: answer tokens right, answer tokens, summed cross-entropy in nats. Log-probabilities
    are of the answer tokens in order."""
    asked_BT = targets_BT != IGNORED
    answers_N = targets_BT[asked_BT]
    losses_N = -log_p_NV.gather(1, answers_N[:, None])[:, 0]
    figures_N3 = torch.stack([log_p_NV.argmax(-1) == answers_N, torch.ones_like(answers_N), losses_N], dim=1).double()
    of_N = (torch.arange(len(targets_BT), device=targets_BT.device) // (len(targets_BT) // tasks)).repeat_interleave(
        asked_BT.sum(1)
    )
    return figures_N3.new_zeros(tasks, 3).index_add_(0, of_N, figures_N3)
