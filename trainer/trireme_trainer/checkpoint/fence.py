"""The fence: which attempt may commit here. Written by each attempt when it starts, read before every commit.

Within one owner (a job, by UID) the attempt only rises. Another owner takes the root over when it starts: a job that
was deleted and applied again counts its attempts from the beginning, and two live jobs on one root must not both write.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from trireme_trainer.checkpoint.errors import CheckpointError, StaleAttempt
from trireme_trainer.checkpoint.files import Files
from trireme_trainer.checkpoint.layout import FENCE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fence:
    attempt: int
    owner: str = ""
    generation: int = 1
    """How many owners this root has had."""


def read(files: Files) -> Fence | None:
    """None when no attempt ever started here. Raises CheckpointError for one that cannot be understood."""
    try:
        with files.open_read("", FENCE) as stream:
            data = json.loads(stream.read(65536))
        return Fence(int(data["attempt"]), str(data.get("owner", "")), int(data.get("generation", 1)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{files.path('')}/{FENCE}"
        remedy = "delete the file if no other attempt is running"
        raise CheckpointError(f"{where}: not a fence ({error}); {remedy}") from None


def claim(files: Files, attempt: int, owner: str = "") -> Fence:
    """Makes `attempt` the one that may commit. Raises StaleAttempt when a newer one of the same owner did so before."""
    files.make("")
    with files.lock():
        now = read(files)
        if now is not None and now.owner == owner and now.attempt > attempt:
            raise StaleAttempt(_stale(files, now, attempt))
        if now is not None and now.owner != owner:
            log.warning("%s: taken over from job %r by job %r", files.path(""), now.owner, owner)
        generation = 1 if now is None else now.generation + (now.owner != owner)
        fence = Fence(attempt, owner, generation)
        if fence != now:
            files.replace("", FENCE, json.dumps(asdict(fence)).encode())
    return fence


def check(files: Files, mine: Fence) -> None:
    """Raises StaleAttempt unless `mine` still stands. Call it while holding `files.lock()`."""
    now = read(files)
    if now is None:
        raise CheckpointError(f"{files.path('')}/{FENCE}: gone; was the checkpoint root emptied while the job ran?")
    if now != mine:
        raise StaleAttempt(_stale(files, now, mine.attempt, mine.owner))


def _stale(files: Files, now: Fence, attempt: int, owner: str | None = None) -> str:
    where = files.path("")
    if owner is not None and now.owner != owner:
        return (
            f"{where}: another job ({now.owner or 'unnamed'}, attempt {now.attempt}) took this checkpoint root over; "
            "give each job its own checkpoint.uri"
        )
    return (
        f"{where}: attempt {attempt} is stale, attempt {now.attempt} has taken over; it may not commit. "
        f"If attempt {now.attempt} belongs to a run that is gone, delete {where}/{FENCE}"
    )
