"""Kubernetes quantities ("500m", "8Gi", 2) as plain numbers, and numbers of bytes for people."""

from __future__ import annotations

import re

_SUFFIX = {
    "": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip
_FORM = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|([numkMGTPE]|[KMGTPE]i)?)$")


def parse_quantity(value: str | int | float) -> float:
    """The number a quantity stands for: cores, bytes or pieces. Raises ValueError saying what the forms are."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _FORM.match(str(value).strip())
    if match is None:
        raise ValueError(f"{value!r} is not a quantity; write e.g. 500m, 2, 8Gi")
    number, exponent, suffix = match.groups()
    return float(number + (exponent or "")) * _SUFFIX[suffix or ""]


def size(count: float) -> str:
    """Bytes for people: 512 B, 12.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
