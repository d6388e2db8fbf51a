"""What a user's YAML file holds: TrainingJobs, recipes, and what stands beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError
from trireme_api.job import KIND, InvalidSpecs, field_names
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec, problems


def read(file: str | Path) -> list[Any]:
    """All documents of a file (- is standard input), those in a List one by one, empty ones as None. Raises OSError,
    and InvalidSpec that names the line."""
    try:
        with click.open_file(str(file), encoding="utf-8") as stream:
            return [one for document in yaml.safe_load_all(stream.read()) for one in _each(document)]
    except UnicodeDecodeError as error:
        raise InvalidSpec("YAML", f"byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise InvalidSpec("YAML", where + ": ".join(part for part in (error.context, error.problem) if part)) from None
    except yaml.YAMLError as error:
        raise InvalidSpec("YAML", " ".join(str(error).split())) from None


def _each(document: Any) -> list[Any]:
    """What `kubectl get -o yaml` prints of several objects is one document."""
    items = document.get("items") if isinstance(document, dict) and str(document.get("kind")).endswith("List") else None
    return items if isinstance(items, list) else [document]


def is_job(document: Any) -> bool:
    """Also one that forgot to say so."""
    return isinstance(document, dict) and (document.get("kind") or (KIND if "spec" in document else "")) == KIND


def is_recipe(document: Any) -> bool:
    return isinstance(document, dict) and document.get("kind") is None and "spec" not in document


def the_one(file: Path) -> dict[str, Any]:
    """The one TrainingJob of a file or, where it has none, its one recipe; other kinds beside it are passed over.
    Raises OSError, and InvalidSpec that names the file."""
    try:
        found = [document for document in read(file) if document is not None]
    except InvalidSpec as error:
        raise InvalidSpec(str(file), str(error)) from None
    for what, chosen in (("TrainingJob", list(filter(is_job, found))), ("recipe", list(filter(is_recipe, found)))):
        if len(chosen) > 1:
            raise InvalidSpec(str(file), f"holds {len(chosen)} {what}s; give a file with one")
        if chosen:
            return dict(chosen[0])
    raise InvalidSpec(
        str(file), f"holds {_told(found)}; must hold a recipe (model, data, batch, until …) or a TrainingJob"
    )


def _told(found: Sequence[Any]) -> str:
    kinds = [f"kind {one['kind']}" if isinstance(one, dict) else f"a {type(one).__name__}" for one in found]
    return ", ".join(kinds) or "nothing"


@contextlib.contextmanager
def named(file: Path) -> Iterator[None]:
    """Several problems become one line that begins with the file."""
    try:
        yield
    except InvalidSpecs as error:
        raise InvalidSpec(str(file), str(error)) from None


def parse_recipe(document: dict[str, Any]) -> Recipe:
    """Raises InvalidSpecs."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise InvalidSpecs(problems(error, known=field_names(Recipe))) from None
