"""Finding the newest checkpoint that is good, and loading it; every rank comes to the same answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trireme_trainer.checkpoint import dcp
from trireme_trainer.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    IncompatibleCheckpoint,
    NoUsableCheckpoint,
)
from trireme_trainer.checkpoint.manifest import Manifest
from trireme_trainer.checkpoint.ranks import Ranks, describe
from trireme_trainer.checkpoint.store import Candidate, CheckpointStore
from trireme_trainer.checkpoint.verify import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was committed and could not be used."""

    candidate: Candidate
    problems: tuple[Problem, ...]

    @property
    def damaged(self) -> bool:
        return any(problem.damaged for problem in self.problems)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)


@dataclass(frozen=True)
class LoadedCheckpoint:
    step: int
    meta: Mapping[str, Any]
    path: str
    manifest: Manifest
    rejected: tuple[Rejected, ...]
    """Newer ones that had to be passed over, newest first."""
    verify_seconds: float
    read_seconds: float

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of every rejected one."""
        return [(rejected.candidate.path, str(rejected)) for rejected in self.rejected]


def load_newest(
    store: CheckpointStore,
    ranks: Ranks,
    tensors: dict[str, Tensor],
    *,
    strict: bool,
    at_most: int | None = None,
    newer_than: int = -1,
) -> LoadedCheckpoint | None:
    """See Checkpointer.load. Collective on `ranks`. `at_most`, `newer_than`: no other step is looked at."""
    rejected: list[Rejected] = []
    for candidate in ranks.on_first(store.candidates):
        if candidate.step <= newer_than or (at_most is not None and candidate.step > at_most):
            continue
        mark = time.perf_counter()
        manifest, problems = _verified(store, ranks, candidate)
        verified = time.perf_counter()
        if manifest is not None and not problems:
            problems = _read(store, ranks, candidate, manifest, tensors, strict)
        if manifest is not None and not problems:
            times = (verified - mark, time.perf_counter() - verified)
            return LoadedCheckpoint(manifest.step, manifest.meta, candidate.path, manifest, tuple(rejected), *times)
        rejected.append(Rejected(candidate, tuple(problems)))
        if ranks.rank == 0:
            log.error("%s: not usable: %s", candidate.path, rejected[-1])
    if rejected:
        reasons = "; ".join(str(r) for r in rejected)
        error = NoUsableCheckpoint(
            f"{store.files.path('')}: none of {len(rejected)} checkpoints is usable ({reasons}); "
            "restore one from a copy, or empty the directory to start afresh"
        )
        error.steps = tuple(r.candidate.step for r in rejected)
        raise error
    return None


def _verified(store: CheckpointStore, ranks: Ranks, candidate: Candidate) -> tuple[Manifest | None, list[Problem]]:
    manifest, problem = ranks.on_first(lambda: store.inspect(candidate))
    if manifest is None:
        assert problem is not None
        return None, [problem]
    shares = ranks.everywhere(lambda: store.verify_share(candidate, manifest, ranks.rank, ranks.world))
    return manifest, [problem for share in shares for problem in share]


def _read(
    store: CheckpointStore,
    ranks: Ranks,
    candidate: Candidate,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    strict: bool,
) -> list[Problem]:
    names = {entry.name for entry in manifest.files}
    try:
        metadata = ranks.everywhere_own(lambda: dcp.read_metadata(store.files, candidate.directory, names))
        ranks.everywhere(lambda: dcp.check_compatible(tensors, metadata, strict=strict))
        ranks.everywhere_own(lambda: dcp.read(store.files, candidate.directory, tensors, metadata, ranks))
    except IncompatibleCheckpoint as error:
        raise IncompatibleCheckpoint(
            f"{candidate.path} is not of this job: {error}; use the recipe it was made with, or another checkpoint.uri"
        ) from None
    except DamagedCheckpoint as error:
        return [Problem(candidate.path, str(error), True)]
    except CheckpointError as error:
        return [Problem(candidate.path, describe(error), False)]
    return []
