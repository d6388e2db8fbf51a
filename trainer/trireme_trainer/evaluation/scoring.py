"""Log-likelihoods of given tokens after given tokens, by all ranks together. B sequences, T time, N scored tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trireme_api.families.memory import positions_at_once

from trireme_trainer.families import LanguageModel, Project
from trireme_trainer.layers.mode import evaluating
from trireme_trainer.parallel.world import World

Told = Callable[[int, int], None]
"""(batches done, batches in all), of this rank."""


def perplexity(loss: float) -> float | None:
    """None for a model so wrong that JSON, which knows no infinity, has no number for it."""
    return round(math.exp(loss), 4) if loss < 700 else None


@dataclass(frozen=True)
class Request:
    tokens: NDArray[np.int64]
    """[n], n ≥ 2."""
    scored: int
    """How many of the last ones are asked about, 1 to n − 1."""


@dataclass(frozen=True)
class Score:
    log_likelihood: float
    """Nats, summed over the scored tokens."""
    greedy: bool
    """Whether each of them was the most likely one."""


def score(
    model: LanguageModel, requests: Sequence[Request], world: World, sequences: int, told: Told = lambda *_: None
) -> list[Score]:
    """By request, the same on every rank. Collective.

    Requests are sorted by length and cut into batches before these are dealt to ranks in turn, so what stands beside a
    request does not depend on how many ranks there are. A rank without a batch in the last round takes part with the
    first one, whose scores it drops: sharded weights are gathered by all ranks or by none.
    """
    if not requests:
        return []
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].tokens), i))
    batches = [order[i : i + sequences] for i in range(0, len(order), sequences)]
    found = torch.zeros(len(requests), 2, dtype=torch.float64)
    rounds = -(-len(batches) // world.data_size)
    # Compiled blocks would be compiled anew for each length, and give up after a few.
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for number in range(rounds):
            place = number * world.data_size + world.data_rank
            mine = batches[place] if place < len(batches) else batches[0]
            scores_B2 = _batch(model, [requests[i] for i in mine], world.device)
            if place < len(batches):
                found[mine] = scores_B2.cpu()
            told(number + 1, rounds)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    totals = world.sum(found.flatten().tolist())
    return [Score(total, greedy > 0.5) for total, greedy in totals.view(-1, 2).tolist()]


def _batch(model: LanguageModel, requests: list[Request], device: torch.device) -> Tensor:
    """[B, 2], float64: sums of log-likelihoods, and 1 where every scored token was the most likely. Sequences are
    padded behind, where no causal model looks, with a token of their own."""
    longest = max(len(request.tokens) for request in requests) - 1
    tokens = np.zeros((len(requests), longest), dtype=np.int64)
    rows, places, targets = [], [], []
    for row, request in enumerate(requests):
        length = len(request.tokens) - 1
        tokens[row, :length] = request.tokens[:-1]
        tokens[row, length:] = request.tokens[-1]
        rows.append(np.full(request.scored, row))
        places.append(row * longest + np.arange(length - request.scored, length))
        targets.append(request.tokens[-request.scored :])
    places_N, targets_N = (torch.from_numpy(np.concatenate(x)).to(device) for x in (places, targets))
    each_N2 = token_scores(model, torch.from_numpy(tokens).to(device), places_N, targets_N).to(torch.float64)
    rows_N = torch.from_numpy(np.concatenate(rows)).to(device)
    sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=device).index_add_(0, rows_N, each_N2)
    counts = torch.bincount(rows_N, minlength=len(requests))
    return torch.stack([sums[:, 0], (sums[:, 1] == counts).to(torch.float64)], dim=1)


def token_scores(model: LanguageModel, tokens_BT: Tensor, places_N: Tensor, targets_N: Tensor) -> Tensor:
    """[N, 2], fp32: log-likelihood of each target (of −100: 0), and 1 where it is the most likely token. Only
    `places_N`, counted row by row over B·T, have logits, and no more than one chunk of them is alive."""
    chunk = positions_at_once(model.config.vocabulary_size)

    def head(hidden_BTD: Tensor, project: Project) -> Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places_N)
        parts = []
        for hidden, targets in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True):
            logits = project(hidden).float()
            likelihood = -F.cross_entropy(logits, targets, reduction="none")
            parts.append(torch.stack([likelihood, (logits.argmax(dim=1) == targets).float()], dim=1))
        return torch.cat(parts)

    out: Tensor = model(tokens_BT, head)
    return out
