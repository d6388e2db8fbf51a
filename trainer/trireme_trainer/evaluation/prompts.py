"""From a task to what a model is asked: solved examples, tokens, and from scores to figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trireme_trainer.data.order import derive, permute
from trireme_trainer.data.tokenizer import Encoder
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.scoring import Request, Score, perplexity
from trireme_trainer.evaluation.tasks import Task

_DEMONSTRATIONS = 4
"""Purpose of keys, beside those of data and masks."""


@dataclass(frozen=True)
class Round:
    """A task with so many solved examples, drawn once."""

    task: Task
    shots: int
    draw: int
    limit: int | None

    @property
    def asked(self) -> int:
        count = len(self.task.examples)
        return count if self.limit is None else min(count, self.limit)

    def texts(self, seed: int) -> list[tuple[str, str]]:
        """(context, continuation) of each choice of each example, in their order."""
        task = self.task
        found = []
        for number in range(self.asked):
            solved = [task.demonstrations[i].solved for i in drawn(task, number, self.shots, derive(seed, self.draw))]
            before = task.separator.join([*([task.description] if task.description else []), *solved, ""])
            found += [(before + context, continuation) for context, continuation in task.examples[number].pairs]
        return found


def check_shots(task: Task, shots: int, where: str) -> None:
    there = len(task.demonstrations) - task.own
    if shots > there:
        raise EvaluationError(f"{where}: {shots} shots of {there} demonstrations; ask for fewer or add some")


def drawn(task: Task, number: int, shots: int, key: int) -> list[int]:
    """Which demonstrations example `number` gets: a function of key and number, so the same in any world and beside any
    limit. Those of k shots are the last k of those of k + 1. Never the example itself."""
    count = len(task.demonstrations)
    order = (permute(i, count, derive(key, _DEMONSTRATIONS, number)) for i in range(count))
    found: list[int] = []
    while len(found) < shots:
        place = next(order)
        if not (task.own and place == number):
            found.append(place)
    return found[::-1]


def encode(
    texts: Sequence[tuple[str, str]], encoder: Encoder, length: int, document_start: bool
) -> tuple[list[Request], int]:
    """Requests of at most `length` tokens of context and continuation together, cut at the front; and how many were.

    White space that ends a context goes to the continuation, and the continuation's tokens are those of the whole text
    that come after as many as the context has alone: a tokenizer may join what stands on both sides of the cut, and
    what is scored must be text as it occurs (the rule of lm-evaluation-harness, which results are compared with).
    """
    moved = []
    for context, continuation in texts:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation))
    alone = encoder.text([context for context, _ in moved])
    whole = encoder.text(["".join(pair) for pair in moved])
    requests, cut = [], 0
    for context_ids, ids in zip(alone, whole, strict=True):
        given = len(context_ids)
        tokens = np.asarray(ids, dtype=np.int64)
        scored = max(1, len(tokens) - given)
        if document_start or given == 0:
            tokens = np.concatenate([[encoder.end_of_document], tokens])
        scored = min(scored, len(tokens) - 1)
        if len(tokens) > length + 1:
            cut += 1
            tokens = tokens[-(length + 1) :]
            scored = min(scored, length)
        requests.append(Request(tokens, scored))
    return requests, cut


@dataclass(frozen=True)
class Answers:
    """Of one round."""

    round: Round
    examples: int
    cut: int
    by_sum: float
    by_mean: float
    """Share of right answers, choices compared by their log-likelihoods' sum and by its mean over tokens. Of a cloze
    task: the share whose every token was the most likely one, both."""
    loss: float
    """Nats per token of the right continuation."""


def judge(round_: Round, requests: Sequence[Request], scores: Sequence[Score], cut: int) -> Answers:
    """Of equal choices the first counts as the answer."""
    by_sum = by_mean = tokens = 0
    nats = 0.0
    place = 0
    for example in round_.task.examples[: round_.asked]:
        end = place + len(example.pairs)
        sums = [score.log_likelihood for score in scores[place:end]]
        means = [total / request.scored for total, request in zip(sums, requests[place:end], strict=True)]
        right = place + example.right
        nats -= scores[right].log_likelihood
        tokens += requests[right].scored
        if round_.task.cloze:
            by_sum += scores[right].greedy
            by_mean += scores[right].greedy
        else:
            by_sum += sums.index(max(sums)) == example.right
            by_mean += means.index(max(means)) == example.right
        place = end
    asked = round_.asked
    return Answers(round_, asked, cut, by_sum / asked, by_mean / asked, nats / tokens)


def row(answers: Sequence[Answers]) -> dict[str, Any]:
    """One line of the result: a task and a number of shots, all draws."""
    first, task = answers[0], answers[0].round.task
    sums, means = [a.by_sum for a in answers], [a.by_mean for a in answers]
    loss = statistics.fmean(a.loss for a in answers)
    accuracy = statistics.fmean(sums)
    found: dict[str, Any] = {
        "task": task.name, "language": task.language, "shots": first.round.shots, "draws": len(answers),
        "examples": first.examples, "cut": sum(a.cut for a in answers),
    }  # fmt: skip
    error = round(math.sqrt(accuracy * (1 - accuracy) / first.examples), 6)
    if task.cloze:
        found |= {"exact": round(accuracy, 6), "standardError": error, "perplexity": perplexity(loss)}
    else:
        found |= {
            "accuracy": {"sum": round(accuracy, 6), "mean": round(statistics.fmean(means), 6)},
            "standardError": error, "chance": round(_chance(first.round), 6), "rightLoss": round(loss, 6),
        }  # fmt: skip
    if len(answers) > 1:
        found["deviation"] = round(statistics.stdev(sums), 6)
    return found


def _chance(round_: Round) -> float:
    return statistics.fmean(1 / len(example.pairs) for example in round_.task.examples[: round_.asked])
