"""A lock between processes that may die, freeze, or sit on different machines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)
PATIENCE = 30.0
"""Seconds. A holder that froze (not died: that frees the lock) must not stop the attempt that replaces it."""


@contextlib.contextmanager
def exclusive(path: str, patience: float = PATIENCE) -> Iterator[None]:
    """flock on `path`. Goes on without it, with a warning, where the filesystem has none or the holder is frozen."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, path, patience)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                log.warning("%s: this filesystem has no locks; attempts are kept apart by the fence alone", path)
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                raise
        if time.monotonic() > deadline:
            log.warning("%s: held for %.0f s by a process that does not move; going on without it", path, patience)
            return
        time.sleep(0.02)
