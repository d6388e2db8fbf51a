"""How a message becomes JSON and back, checked field by field against its type hints.

Standard library only and Python 3.9 syntax: travels with the agent.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any, Dict, Tuple, Type, TypeVar

MAX_TEXT_CHARS = 2048
"""Free text from a pod (messages, tracebacks) is cut to this before it enters status or a log."""

_AS_IT_IS = frozenset({str, int, float, bool})

T = TypeVar("T", bound="Message")


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


_known: Dict[type, Tuple[Tuple[str, str, Any], ...]] = {}


def _fields(kind: Type[Message]) -> Tuple[Tuple[str, str, Any], ...]:
    """(field, JSON key, type hint) of a message class. Kept: a rank writes a message with each step, an operator reads
    hundreds a second, and to work out the hints takes longer than all the rest."""
    if kind not in _known:
        hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
        _known[kind] = tuple((f.name, _camel(f.name), hints[f.name]) for f in dataclasses.fields(kind))
    return _known[kind]


class ProtocolError(ValueError):
    """A message that does not have the agreed form; the text names the field."""


@dataclass
class Message:
    """A dataclass that knows its JSON form (camelCase keys, None left out)."""

    def to_json(self) -> Dict[str, Any]:
        out: Dict[str, Any] = {}
        for name, key, _ in _fields(type(self)):
            value = getattr(self, name)
            if value is not None:
                out[key] = _plain(value)
        return out

    @classmethod
    def from_json(cls: Type[T], data: Any) -> T:
        """Builds the message, ignoring unknown keys. Raises ProtocolError naming the field that does not fit."""
        if not isinstance(data, dict):
            raise ProtocolError(f"{cls.__name__}: expected an object, got {type(data).__name__}")
        values: Dict[str, Any] = {}
        for name, key, hint in _fields(cls):
            if data.get(key) is not None:
                values[name] = _typed(hint, data[key], f"{cls.__name__}.{key}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ProtocolError(f"{cls.__name__}: {error}") from None


def _plain(value: Any) -> Any:
    if value.__class__ in _AS_IT_IS:
        return value
    if isinstance(value, Message):
        return value.to_json()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        return _typed(next(a for a in args if a is not type(None)), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ProtocolError(f"{where}: expected a list, got {type(value).__name__}")
        return [_typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ProtocolError(f"{where}: expected an object, got {type(value).__name__}")
        return {str(key): _typed(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Message):
        return hint.from_json(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise ProtocolError(f"{where}: {value!r} is not one of {[m.value for m in hint]}") from None
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return clean_text(value)
    if hint is bool and isinstance(value, bool):
        return value
    raise ProtocolError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def clean_text(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Text from a pod made safe for logs and status: no control characters but newline and tab; the end is kept."""
    text = _CONTROL.sub("?", text)
    return text if len(text) <= limit else "…" + text[-(limit - 1):]
