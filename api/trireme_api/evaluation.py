"""How a model is evaluated: held-out text, and tasks answered by likelihood. In a recipe, and of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from trireme_api.schema import PositiveInt, Spec


class HeldOutSource(Spec):
    path: str = Field(min_length=1, max_length=1024)
    """Shards made by `trireme prepare`, with the tokenizer that the model is trained with."""
    name: str | None = Field(default=None, min_length=1, max_length=63)
    """What figures call it; left out: the last part of `path`."""
    language: str | None = Field(default=None, min_length=1, max_length=35)
    """Sources of one language are summed up in a figure of their own, e.g. sw. Left out: what `trireme prepare
    --language` wrote beside the shards, if anything."""
    split: Literal["valid", "train"] = "valid"
    """valid: what `trireme prepare` held out. train: the rest, for a directory that is not trained on."""


class EvaluationSpec(Spec):
    every_steps: PositiveInt | None = None
    """Steps between evaluations; left out: after the last step alone."""
    held_out: bool = True
    """Perplexity on what each of data.sources holds out."""
    sources: list[HeldOutSource] = Field(default=[], max_length=256)
    """More text to measure perplexity on, beside data.sources."""
    tokens: PositiveInt | None = None
    """At most so many tokens of each source, its first ones; left out: all."""
    tasks: list[str] = Field(default=[], max_length=256)
    """Task files (docs/evaluation.md): pvc://claim/file, or a local path under `trireme run`."""
    shots: list[int] = Field(default=[0], min_length=1, max_length=16)
    """Numbers of solved examples put before the one that is asked."""
    draws: PositiveInt = 1
    """Times those examples are drawn; figures are means over them (XGLM, 2112.10668: 5)."""
    limit: PositiveInt | None = None
    """At most so many examples of each task, its first ones; left out: all."""
    document_start: bool = True
    """What is scored begins with the end-of-document token, as documents do in training. False: only where it would
    otherwise have no context at all."""
    sequences: PositiveInt | None = None
    """Sequences that one rank takes through the model at once; left out: batch.micro."""

    def paths(self) -> Iterator[tuple[str, str]]:
        """(field, path) of all that is read."""
        for i, source in enumerate(self.sources):
            yield f"sources[{i}].path", source.path
        for i, task in enumerate(self.tasks):
            yield f"tasks[{i}]", task


def in_words(found: Mapping[str, Any]) -> Iterator[str]:
    """Figures of an evaluation, as the step log has them, a line each."""
    for text in found["heldOut"]:
        name = text["source"] or f"all of language {text['language']}"
        # Of a masked model there are none.
        bits = f"{text['bitsPerByte']:.4f} bits per byte, " if "bitsPerByte" in text else ""
        tokens = "tokens" if bits else "hidden tokens"
        yield f"{name}: perplexity {_number(text['perplexity'])}, {bits}{text['tokens']:,} {tokens}"
    for task in found["tasks"]:
        about = f"{task['task']}, {task['shots']} shots, {task['examples']:,} examples"
        if "exact" in task:
            yield f"{about}: exact {task['exact']:.4f} ± {task['standardError']:.4f}"
        else:
            both = task["accuracy"]
            yield (
                f"{about}: accuracy {both['sum']:.4f} ± {task['standardError']:.4f} "
                f"(mean per token {both['mean']:.4f}, chance {task['chance']:.4f})"
            )


def _number(value: float | None) -> str:
    return "beyond measure" if value is None else f"{value:,.3f}"
