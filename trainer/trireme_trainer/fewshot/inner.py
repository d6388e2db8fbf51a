"""The inner optimisation: gradient steps on the embedding of a task, the weights held (2012.09543 Algorithm 1).

Loss and step are those of the mean over a task's answer tokens (ours), so that a learning rate serves any number of
examples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme_trainer.families import LanguageModel, Project
from trireme_trainer.fewshot.embedding import task_token
from trireme_trainer.fewshot.tasks import IGNORED


def answer_losses(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, z_BD: Tensor) -> Tensor:
    """Cross-entropy of each answer token, in order, fp32 [answers]; only they reach the output layer."""

    def head(hidden_BTD: Tensor, project: Project) -> Tensor:
        asked_BT = targets_BT != IGNORED
        logits_NV = project(hidden_BTD[asked_BT])
        return F.cross_entropy(logits_NV.float(), targets_BT[asked_BT], reduction="none")

    with task_token(model, z_BD):
        out: Tensor = model(tokens_BT, head)
    return out


def answers_of(targets_EJT: Tensor) -> Tensor:
    """Answer tokens of each episode, at least 1: [episodes, 1], fp32."""
    return (targets_EJT != IGNORED).flatten(1).sum(1, keepdim=True).clamp(min=1).to(torch.float32)


def adapt(
    model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, begin_ED: Tensor, *, steps: int, learning_rate: float
) -> Tensor:
    """Embeddings of unseen tasks after `steps` steps on each one's own examples, [tasks, width]; rows are [tasks ·
    examples]. Asks for the gradient of the embeddings alone: no weight gets one, and none changes."""
    tasks = len(begin_ED)
    examples = len(tokens_BT) // tasks
    answers_E1 = answers_of(targets_BT.view(tasks, examples, -1))
    z_ED = begin_ED.detach().clone()
    for _ in range(steps):
        z_ED.requires_grad_(True)
        loss = answer_losses(model, tokens_BT, targets_BT, z_ED.repeat_interleave(examples, dim=0)).sum()
        (gradient,) = torch.autograd.grad(loss, [z_ED])
        z_ED = (z_ED - learning_rate * gradient / answers_E1).detach()
    return z_ED
