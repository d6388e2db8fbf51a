"""One-line errors and timed progress lines: all that a user sees of the local cluster."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import Iterator


class ClusterError(Exception):
    """Something the user can act on; `str()` is one line that says what is missing and the remedy."""


def say(message: str) -> None:
    """Progress goes to stderr so that `--json` and `kubeconfig` output on stdout stays clean."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print `what ... 1.2 s` when the block ends; nothing is hidden when it raises."""
    began = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"  {what} ... failed after {time.monotonic() - began:.1f} s")
        raise
    say(f"  {what} ... {time.monotonic() - began:.1f} s")
