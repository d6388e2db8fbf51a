"""Task files: what is asked, how it is put into words, and what the right answer is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field, ValidationError
from trireme_api.schema import Spec, problems

from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.storage import StorageError, is_local, open_filesystem

_FIELD = re.compile(r"\{(\w+)\}")
Fields = Mapping[str, Any]


class TaskSpec(Spec):
    """A task file. Templates are text with {field} in it, filled from an example's fields."""

    name: str = Field(min_length=1, max_length=63)
    language: str | None = None
    examples: str | list[dict[str, Any]]
    """A .jsonl file, one example per line, beside the task file; or the examples themselves."""
    demonstrations: str | list[dict[str, Any]] | None = None
    """What solved examples are drawn from; left out: the examples, without the one that is asked."""
    description: str = ""
    """Stands before everything else."""
    context: str = ""
    """Template of what is given. {choice} in it: the choice at hand."""
    continuation: str = Field(min_length=1)
    """Template of what is scored after it."""
    choices: list[str] | str | None = None
    """Templates of the answers to choose from, or the field of an example that lists them. Left out: a cloze task,
    whose only continuation is to be the model's most likely one."""
    answer: str | None = None
    """The field that tells the right choice: its place from 0, one of `labels`, or its text."""
    labels: list[str | int] | None = None
    """Values of that field, in the order of `choices`."""
    separator: str = "\n"
    """Between solved examples, and between them and the one that is asked."""


@dataclass(frozen=True)
class Example:
    """One question in words, a pair for each choice."""

    pairs: tuple[tuple[str, str], ...]
    """(context, continuation)"""
    right: int

    @property
    def solved(self) -> str:
        return "".join(self.pairs[self.right])


@dataclass(frozen=True)
class Task:
    name: str
    language: str | None
    cloze: bool
    description: str
    separator: str
    examples: tuple[Example, ...]
    demonstrations: tuple[Example, ...]
    own: bool
    """Whether demonstrations are the examples themselves."""


def read_task(path: str) -> Task:
    """Raises EvaluationError with one line that names file, example and field."""
    try:
        raw = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise EvaluationError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise EvaluationError(f"{path}: expected a task with name, examples and continuation; see docs/evaluation.md")
    try:
        spec = TaskSpec.model_validate(raw)
    except ValidationError as error:
        known = [field.alias or key for key, field in TaskSpec.model_fields.items()]
        raise EvaluationError(f"{path}: " + "; ".join(str(p) for p in problems(error, known))) from None
    if (spec.choices is None) != (spec.answer is None):
        raise EvaluationError(f"{path}: choices and answer go together; give both, or neither for a cloze task")
    if spec.labels is not None and isinstance(spec.choices, list) and len(spec.labels) != len(spec.choices):
        raise EvaluationError(f"{path}: labels: {len(spec.labels)} for {len(spec.choices)} choices; give one for each")
    examples = _examples(spec, spec.examples, path, "examples")
    own = spec.demonstrations is None
    demonstrations = examples if own else _examples(spec, spec.demonstrations or [], path, "demonstrations")
    return Task(
        spec.name, spec.language, spec.choices is None, spec.description, spec.separator, examples, demonstrations, own
    )


def _examples(spec: TaskSpec, given: str | Sequence[Fields], path: str, what: str) -> tuple[Example, ...]:
    rows: Iterable[tuple[str, Fields]]
    if isinstance(given, str):
        there = given if "://" in given or given.startswith("/") else f"{path.rpartition('/')[0] or '.'}/{given}"
        rows = _lines(there, f"{path}: {what}")
    else:
        rows = [(f"{path}: {what}[{i}]", row) for i, row in enumerate(given)]
    found = tuple(_example(spec, row, where) for where, row in rows)
    if not found:
        raise EvaluationError(f"{path}: {what}: there are none; give at least one")
    return found


def _lines(path: str, field: str) -> Iterable[tuple[str, Fields]]:
    for number, line in enumerate(_read(path, field).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{where}: not JSON ({error}); give one object per line") from None
        if not isinstance(row, dict):
            raise EvaluationError(f"{where}: not an object; give one object per line")
        yield where, row


def _example(spec: TaskSpec, fields: Fields, where: str) -> Example:
    if spec.choices is None:
        return Example((_pair(spec, fields, where),), 0)
    if isinstance(spec.choices, str):
        listed = fields.get(spec.choices)
        if not isinstance(listed, list):
            raise EvaluationError(f"{where}: field {spec.choices!r}, which choices names, must be a list")
        choices = [str(choice) for choice in listed]
    else:
        choices = [_fill(choice, fields, where, "choices") for choice in spec.choices]
    if len(choices) < 2:
        raise EvaluationError(f"{where}: choices: {len(choices)} of them; give two or more")
    pairs = tuple(_pair(spec, {**fields, "choice": choice}, where) for choice in choices)
    return Example(pairs, _right(spec, fields, choices, where))


def _right(spec: TaskSpec, fields: Fields, choices: list[str], where: str) -> int:
    assert spec.answer is not None
    if spec.answer not in fields:
        raise EvaluationError(f"{where}: no field {spec.answer!r}, which answer names")
    value = fields[spec.answer]
    if spec.labels is not None:
        if value in spec.labels and spec.labels.index(value) < len(choices):
            return spec.labels.index(value)
        raise EvaluationError(f"{where}: {spec.answer}: {value!r} is none of labels {spec.labels}")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    raise EvaluationError(
        f"{where}: {spec.answer}: {value!r} is neither a place from 0 to {len(choices) - 1} nor the text of a choice; "
        "for other values give labels"
    )


def _pair(spec: TaskSpec, fields: Fields, where: str) -> tuple[str, str]:
    context = _fill(spec.context, fields, where, "context")
    continuation = _fill(spec.continuation, fields, where, "continuation")
    if not continuation.strip():
        raise EvaluationError(f"{where}: continuation: is empty; there is nothing to score")
    return context, continuation


def _fill(template: str, fields: Fields, where: str, what: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in fields:
            raise EvaluationError(f"{where}: no field {name!r}, which {what} asks for; it has {', '.join(fields)}")
        return str(fields[name])

    return _FIELD.sub(value, template)


def _read(path: str, field: str = "") -> str:
    before = f"{field}: " if field else ""
    try:
        filesystem, inside = open_filesystem(path)
        text: str = filesystem.cat_file(inside).decode("utf-8")
        return text
    except FileNotFoundError:
        hint = "no such file" if is_local(path) else "not there"
        raise EvaluationError(f"{before}{path}: {hint}") from None
    except UnicodeDecodeError:
        raise EvaluationError(f"{before}{path}: not UTF-8 text") from None
    except StorageError as error:
        raise EvaluationError(f"{before}{error}") from None
    except OSError as error:
        raise EvaluationError(f"{before}{path}: cannot be read ({error})") from None
