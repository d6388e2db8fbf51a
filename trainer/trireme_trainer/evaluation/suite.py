"""All that a specification asks for: opened and checked at once, run any number of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trireme_api.evaluation import EvaluationSpec

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.remote import local_copy
from trireme_trainer.data.shards import Corpus
from trireme_trainer.data.tokenizer import Encoder
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.held_out import Text, figures, open_text
from trireme_trainer.evaluation.prompts import Answers, Round, check_shots, encode, judge, row
from trireme_trainer.evaluation.scoring import Request, score
from trireme_trainer.evaluation.tasks import read_task
from trireme_trainer.families import LanguageModel
from trireme_trainer.parallel.world import World
from trireme_trainer.storage import StorageError

Progress = Callable[[str, int, int], None]
"""(what is being evaluated, batches done, batches in all)"""


class Suite:
    """`length`: tokens a model sees at once; `vocabulary`: rows of its token table. Raises DataError for what cannot be
    read or does not fit, before anything is computed."""

    def __init__(
        self, spec: EvaluationSpec, length: int, vocabulary: int, seed: int, encoder: Encoder | None = None,
        command: bool = False,
    ) -> None:  # fmt: skip
        """`encoder`: of the model; left out: that of the first source. `command`: errors name
        options of the command line, not fields of a recipe."""
        data, shots_field = ("--data", "--shots") if command else ("evaluation.sources[{}].path", "evaluation.shots")
        self._spec = spec
        self._length = length
        self._seed = seed
        self._texts: list[Text] = []
        for i, source in enumerate(spec.sources):
            field = f"{data.format(i)}: {source.path}"
            try:
                corpus = Corpus(local_copy(source.path))
            except (DataError, StorageError) as error:
                raise EvaluationError(f"{data.format(i)}: {error}") from None
            encoder = _same(encoder, corpus, field)
            if corpus.manifest.vocabulary > vocabulary:
                raise EvaluationError(
                    f"{field}: tokenised with {corpus.manifest.vocabulary} entries, the model has {vocabulary}; "
                    "prepare it with the tokenizer that the model was trained with"
                )
            language = source.language or corpus.manifest.language
            text = open_text(corpus, field, source.split, length, spec.tokens, source.name, language)
            self._texts.append(text)
        if not spec.tasks:
            self._rounds: list[list[tuple[Round, list[Request], int]]] = []
            return
        if encoder is None:
            raise EvaluationError("no tokenizer to put tasks into tokens; give one with --tokenizer FILE")
        if encoder.vocabulary > vocabulary:
            raise EvaluationError(
                f"the tokenizer has {encoder.vocabulary} entries, the model {vocabulary}; give the one that the model "
                "was trained with"
            )
        self._rounds = []
        for path in spec.tasks:
            task = read_task(path)
            for shots in spec.shots:
                check_shots(task, shots, f"{shots_field}: {path}")
                draws = []
                for draw in range(spec.draws if shots else 1):
                    one = Round(task, shots, draw, spec.limit)
                    draws.append((one, *encode(one.texts(seed), encoder, length, spec.document_start)))
                self._rounds.append(draws)

    def run(self, model: LanguageModel, world: World, progress: Progress = lambda *_: None) -> dict[str, Any]:
        """Figures, the same on every rank. Collective."""

        def scores(what: str, requests: Sequence[Request]) -> list[Any]:
            told = lambda done, total: progress(what, done, total)  # noqa: E731
            return score(model, requests, world, self._spec.sequences or 1, told)

        heldout = figures(self._texts, [scores(text.name, text.windows) for text in self._texts])
        rows = []
        for draws in self._rounds:
            answers: list[Answers] = []
            for one, requests, cut in draws:
                what = f"{one.task.name}, {one.shots} shots"
                answers.append(judge(one, requests, scores(what, requests), cut))
            rows.append(row(answers))
        return {"heldOut": heldout, "tasks": rows}


def _same(encoder: Encoder | None, corpus: Corpus, field: str) -> Encoder:
    if encoder is None:
        return corpus.encoder()
    if corpus.manifest.tokenizer.sha256 != encoder.sha256:
        raise EvaluationError(
            f"{field}: made with another tokenizer than the model's; prepare it with --tokenizer FILE of that"
        )
    return encoder
