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


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints the title, then the seconds it took."""
    say(f"▸ {title}")
    began = time.monotonic()
    yield
    say(f"  {time.monotonic() - began:.1f} s")


def complain(error: DemoError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1
