"""What conversions of all families share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class ConversionError(ValueError):
    """Weights or a configuration that cannot be carried over; one line that says which and why."""


def pad_rows(weight_VD: Tensor, rows: int, name: str) -> Tensor:
    """`weight_VD` with zero rows appended up to `rows`. Raises ConversionError if it has more rows already."""
    have = weight_VD.shape[0]
    if have > rows:
        raise ConversionError(f"{name}: {have} rows, but the model has a vocabulary of {rows}; set vocabularySize")
    if have == rows:
        return weight_VD
    return torch.cat([weight_VD, weight_VD.new_zeros(rows - have, *weight_VD.shape[1:])])


def cut_rows(weight_VD: Tensor, rows: int | None, name: str) -> Tensor:
    """The first `rows` rows; all of them for None. Raises ConversionError if there are fewer."""
    if rows is None:
        return weight_VD
    if rows > weight_VD.shape[0]:
        raise ConversionError(f"{name}: cannot be cut to {rows} rows, it has {weight_VD.shape[0]}")
    return weight_VD[:rows]


def check_complete(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConversionError unless `state` has exactly the names and shapes of `shapes`."""
    missing, extra = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    if missing:
        raise ConversionError(f"weights missing: {_some(missing)}")
    if extra:
        raise ConversionError(f"weights the model has no place for: {_some(extra)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ConversionError(f"{name}: shape {tuple(state[name].shape)}, the model has {shape}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
