"""Perplexity of hidden tokens of held-out text, for masked language models: by source and language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from trireme_api.evaluation import EvaluationSpec
from trireme_api.masking import SHORTEST, MaskingSpec

from trireme_trainer.data.masking import MaskedBlocks
from trireme_trainer.data.mixture import HeldOut
from trireme_trainer.data.order import derive
from trireme_trainer.data.tokenizer import Encoder, special_tokens
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.held_out import open_sources
from trireme_trainer.evaluation.scoring import perplexity, token_scores
from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.mode import evaluating
from trireme_trainer.parallel.world import World

_HELD_OUT = 4
"""Purpose of keys, beside those of training."""


@dataclass(frozen=True)
class MaskedSource:
    name: str
    language: str | None
    words: HeldOut
    """By block: its tokens of text."""


def open_masked(
    spec: EvaluationSpec, rule: MaskingSpec, length: int, vocabulary: int, seed: int, encoder: Encoder | None
) -> MaskedHeldOut:
    """The sources that the command line names, in blocks of `length`; the other arguments as of a `Suite`. Raises
    DataError before anything is computed."""
    if length < SHORTEST:
        raise EvaluationError(f"--length {length}: a masked model needs blocks of {SHORTEST} tokens at least")
    opened, _ = open_sources(spec.sources, "--data", vocabulary, encoder)
    first = opened[0].corpus
    special = special_tokens(first.tokenizer(), opened[0].where, first.manifest.tokenizer.end_of_document)
    blocks = MaskedBlocks(rule, special, first.manifest.vocabulary, length)
    sources = [MaskedSource(one.name, one.language, HeldOut(one.documents, blocks.words - 1)) for one in opened]
    for one, source in zip(opened, sources, strict=True):
        if not len(source.words):
            raise EvaluationError(
                f"{one.where}: its split {one.source.split} has {one.documents.tokens} tokens, less than one block of "
                f"{blocks.words}; give a shorter --length, or prepare it with a larger --valid-fraction"
            )
    return MaskedHeldOut(sources, blocks, seed, spec.sequences or 1, spec.tokens)


class MaskedHeldOut:
    """Text in blocks; of each block the same tokens are hidden every time, in any world: a function of (seed, place of
    the source, block). No bits per byte: what stands on both sides of a hidden token is given, so these losses do not
    add up to the text's."""

    def __init__(
        self, sources: Sequence[MaskedSource], blocks: MaskedBlocks, seed: int, sequences: int, most: int | None
    ) -> None:
        """`sequences`: through the model at once. `most`: tokens looked at, of each source. Sources without a whole
        block are left out."""
        self._blocks, self._sequences = blocks, sequences
        self._key = derive(seed, _HELD_OUT)
        limit = None if most is None else max(1, most // blocks.sequence_length)
        self._sources = [
            (number, source, len(source.words) if limit is None else min(len(source.words), limit))
            for number, source in enumerate(sources)
            if len(source.words)
        ]

    @property
    def empty(self) -> bool:
        return not self._sources

    def run(
        self, model: LanguageModel, world: World, progress: Callable[[str, int, int], None] = lambda *_: None
    ) -> list[dict[str, Any]]:
        """A row for each source, then one for each language. Collective."""
        rows, languages = [], dict[str, list[tuple[float, float]]]()
        for number, source, size in self._sources:
            told = lambda done, total, name=source.name: progress(name, done, total)  # noqa: E731
            found = self._measure(model, number, source, size, world, told)
            rows.append({"source": source.name, "language": source.language, **_row([found])})
            if source.language is not None:
                languages.setdefault(source.language, []).append(found)
        return rows + [{"source": None, "language": name, **_row(found)} for name, found in sorted(languages.items())]

    def _measure(
        self, model: LanguageModel, number: int, source: MaskedSource, size: int, world: World,
        told: Callable[[int, int], None],
    ) -> tuple[float, float]:  # fmt: skip
        """(hidden tokens, nats). Every rank makes as many passes: sharded weights are gathered by all or by none."""
        share = self._sequences
        turns = range(0, size, share * world.data_size)
        counted = torch.zeros(2, dtype=torch.float64)
        with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for turn, first in enumerate(turns, start=1):
                places = range(first + world.data_rank * share, first + (world.data_rank + 1) * share)
                samples = [
                    self._blocks.sample(source.words[i], derive(self._key, number, i)) if i < size else None
                    for i in places
                ]
                batch = self._blocks.batch(samples).on(world.device)
                targets = batch.targets.flatten()[batch.places]
                likelihood = token_scores(model, batch.tokens, batch.places, targets)[:, 0]
                counted += torch.stack([(targets >= 0).sum().double(), -likelihood.double().sum()]).cpu()
                told(turn, len(turns))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        tokens, nats = world.sum(counted.tolist()).tolist()
        return tokens, nats


def _row(parts: Sequence[tuple[float, float]]) -> dict[str, Any]:
    tokens, nats = (sum(column) for column in zip(*parts, strict=True))
    loss = nats / max(tokens, 1.0)
    return {"tokens": int(tokens), "loss": round(loss, 6), "perplexity": perplexity(loss)}
