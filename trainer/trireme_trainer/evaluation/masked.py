"""Perplexity of hidden tokens of held-out text, for masked language models: by source and language."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule

from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.families import LanguageModel
from trireme_trainer.parallel.world import World

if TYPE_CHECKING:
    from trireme_trainer.objectives.masked_lm import MaskedLM, MaskedText


class MaskedHeldOut:
    """What each source of a mixture holds out, in blocks; of each block the same tokens are hidden every time, in any
    world. No bits per byte: what stands on both sides of a hidden token is given, so these losses do not add up to
    the text's."""

    def __init__(self, text: MaskedText, loss: MaskedLM, sequences: int, most: int | None) -> None:
        """`sequences`: through the model at once. `most`: tokens looked at, of each source."""
        self._text, self._loss, self._sequences = text, loss, sequences
        limit = None if most is None else max(1, most // text.sequence_length)
        self._sources = [
            (number, part, size if limit is None else min(size, limit))
            for number, part in enumerate(text.mixture.parts)
            if (size := len(text.mixture.valid_blocks(number)))
        ]
        if not self._sources:
            raise EvaluationError(
                "evaluation.heldOut: none of data.sources holds out a block of data.sequenceLength; prepare them with "
                "a larger --valid-fraction, or remove evaluation"
            )

    def run(self, model: LanguageModel, world: World, alive: Callable[[], None]) -> list[dict[str, Any]]:
        """A row for each source, then one for each language. Collective."""
        rows, languages = [], dict[str, list[tuple[float, float]]]()
        for number, part, size in self._sources:
            found = self._measure(model, number, size, world, alive)
            name = part.path.rstrip("/").rpartition("/")[2]
            rows.append({"source": name, "language": part.language, **_row([found])})
            if part.language is not None:
                languages.setdefault(part.language, []).append(found)
        return rows + [{"source": None, "language": name, **_row(found)} for name, found in sorted(languages.items())]

    def _measure(
        self, model: LanguageModel, source: int, size: int, world: World, alive: Callable[[], None]
    ) -> tuple[float, float]:
        """(hidden tokens, nats). Every rank makes as many passes: sharded weights are gathered by all or by none."""
        share, one = self._sequences, torch.ones((), device=world.device)
        counted = torch.zeros(2, dtype=torch.float64)
        was, _ = model.training, model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for first in range(0, size, share * world.size):
                alive()
                places = range(first + world.rank * share, first + (world.rank + 1) * share)
                batch = self._text.batch([self._text.held_out(source, i) if i < size else None for i in places])
                loss = self._loss(model, batch.on(world.device), one)
                counted += torch.tensor([float((batch.targets >= 0).sum()), float(loss)], dtype=torch.float64)
        model.train(was)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        tokens, nats = world.sum(counted.tolist()).tolist()
        return tokens, nats


def _row(parts: Sequence[tuple[float, float]]) -> dict[str, Any]:
    tokens, nats = (sum(column) for column in zip(*parts, strict=True))
    loss = nats / max(tokens, 1.0)
    # JSON knows no infinity; a model this wrong has no perplexity worth a number.
    perplexity = round(math.exp(loss), 4) if loss < 700 else None
    return {"tokens": int(tokens), "loss": round(loss, 6), "perplexity": perplexity}
