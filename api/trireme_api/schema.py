"""The base of every model that becomes part of the CRD: camelCase on the wire, unknown fields refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel


class Spec(BaseModel):
    """Written by users: a field nobody knows is an error, never dropped in silence."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", use_attribute_docstrings=True, frozen=True
    )


class Status(BaseModel):
    """Written by the operator: fields of a newer version pass through."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", use_attribute_docstrings=True
    )


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class InvalidSpec(ValueError):
    """One problem of a user's input: `field` is the path as written in YAML, the message says what would be
    right. Where several fields are at fault together, `field` is empty and the message names them."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message


def problems(error: ValidationError, known: Iterable[str] = (), prefix: str = "") -> list[InvalidSpec]:
    """pydantic's errors as one-line problems with YAML paths; a mistyped field gets the nearest known name."""
    found = []
    for item in error.errors():
        path = (prefix + _path(item["loc"])).rstrip(".")
        kind, value = item["type"], item.get("input")
        if kind == "extra_forbidden":
            name = str(item["loc"][-1])
            near = difflib.get_close_matches(name, list(known), n=1)
            message = "unknown field" + (f"; did you mean {near[0]!r}?" if near else "; remove it")
        elif kind == "missing":
            message = "is required"
        else:
            message = item["msg"].removeprefix("Value error, ")
            if isinstance(value, str | int | float | bool):
                message += f" (got {value!r})"
        found.append(InvalidSpec(path, message))
    return found


def _path(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + part
    return text
