"""How the demo speaks: steps with their seconds, and one line for what is wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class DemoError(Exception):
    """One line: what is wrong and what to do about it."""


def say(text: str = "") -> None:
    print(text, flush=True)


seconds: dict[str, float] = {}
"""Of the steps done so far, by title."""


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints the title, then the seconds it took."""
    say(f"▸ {title}")
    began = time.monotonic()
    yield
    seconds[title] = round(time.monotonic() - began, 1)
    say(f"  {seconds[title]} s")


def complain(error: DemoError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1
