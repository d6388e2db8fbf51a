"""All that a specification asks for: opened and checked at once, run any number of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trireme_api.evaluation import EvaluationSpec

from trireme_trainer.data.tokenizer import Encoder
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.held_out import figures, open_sources, open_text
from trireme_trainer.evaluation.prompts import Answers, Round, check_shots, encode, judge, row
from trireme_trainer.evaluation.scoring import Request, score
from trireme_trainer.evaluation.tasks import read_task
from trireme_trainer.families import LanguageModel
from trireme_trainer.parallel.world import World

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
        self._seed = seed
        opened, encoder = open_sources(spec.sources, data, vocabulary, encoder)
        self._texts = [open_text(one, length, spec.tokens) for one in opened]
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
