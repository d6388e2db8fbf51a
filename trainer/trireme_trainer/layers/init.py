"""Initial values as a function of (seed, parameter name) and nothing else: not of rank, world size, device or order.

A tensor is cut along its first dimension into blocks of rows, each with a generator of its own. So a rank that holds
some rows makes these (and less than one block of neighbours), and 175 billion parameters never lie on one rank.

The generator is NumPy's SFC64 seeded through SeedSequence, because torch's CPU generator keeps only 32 bits of its
seed: among the 170,000 blocks of the largest size several would be equal.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Values per generator. Part of the definition of the values: another number gives another model."""


@dataclass(frozen=True)
class Normal:
    """N(0, std²); `zero_row`, the row of a padding entry, is zero."""

    std: float
    zero_row: int | None = None


@dataclass(frozen=True)
class Constant:
    value: float


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float


InitialValue = Normal | Uniform | Constant


def xavier_uniform(fan_in: int, fan_out: int, gain: float = 1.0) -> Uniform:
    """Glorot and Bengio 2010."""
    return Uniform(gain * math.sqrt(6.0 / (fan_in + fan_out)))


def torch_linear(fan_in: int) -> Uniform:
    """What torch gives weight and bias of a Linear layer by default."""
    return Uniform(1.0 / math.sqrt(fan_in))


def value_rows(
    name: str,
    shape: tuple[int, ...],
    rule: InitialValue,
    seed: int,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows [start, stop) of the initial value of the parameter `name` of `shape`, on the CPU.

    Raises ValueError if the range does not lie within the first dimension.
    """
    if not shape:
        raise ValueError(f"{name}: a scalar has no rows")
    if not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"{name}: rows [{start}, {stop}) do not lie within the {shape[0]} rows of the parameter")
    local = (stop - start, *shape[1:])
    if isinstance(rule, Constant):
        return torch.full(local, rule.value, dtype=dtype)
    row = math.prod(shape[1:])
    rows_per_block = max(1, BLOCK_ELEMENTS // max(1, row))
    out = torch.empty(local, dtype=dtype)
    for block in range(start // rows_per_block, -(-stop // rows_per_block)):
        first = block * rows_per_block
        begin, end = max(first, start), min(first + rows_per_block, stop)
        # A generator draws in order, so the rows of a block after the last one wanted need not be drawn.
        values = _draw(rule, _generator(seed, name, block), (end - first, *shape[1:]))
        out[begin - start : end - start].copy_(torch.from_numpy(values[begin - first : end - first]))
    if isinstance(rule, Normal) and rule.zero_row is not None and start <= rule.zero_row < stop:
        out[rule.zero_row - start].zero_()
    return out


def full_value(
    name: str, shape: tuple[int, ...], rule: InitialValue, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The whole initial value: the concatenation of `value_rows` over any partition of the rows."""
    return value_rows(name, shape, rule, seed, 0, shape[0], dtype) if shape else _scalar(name, rule, seed, dtype)


def _scalar(name: str, rule: InitialValue, seed: int, dtype: torch.dtype) -> Tensor:
    return value_rows(name, (1,), rule, seed, 0, 1, dtype)[0]


def _draw(rule: Normal | Uniform, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """fp32 values of `shape`."""
    if isinstance(rule, Normal):
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(rule.std)
    return (generator.random(shape, dtype=np.float32) * np.float32(2.0) - np.float32(1.0)) * np.float32(rule.bound)


def _generator(seed: int, name: str, block: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}\0{block}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "big")))
