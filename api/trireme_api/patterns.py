"""Patterns that users write, matched in time linear in the text (RE2): no pattern can hold the operator up."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import re2

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 1 << 20


@lru_cache(maxsize=1024)
def pattern(text: str) -> Any:
    """The compiled expression, with `search(str)`; ^ and $ match at each line.

    Raises ValueError naming what RE2 does not take.
    """
    try:
        return re2.compile(f"(?m){text}", _OPTIONS)
    except re2.error as error:
        reason = error.args[0] if error.args else "not understood"
        words = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"is not an RE2 expression: {words}") from None
