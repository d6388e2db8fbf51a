"""Asynchronous saving and verified loading for one attempt of a job. The protocol: docs/checkpoints.md."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from trireme_api.protocol import CheckpointRef

from trireme_trainer.checkpoint import dcp
from trireme_trainer.checkpoint.errors import CheckpointError, NoUsableCheckpoint, SaveFailed, StaleAttempt
from trireme_trainer.checkpoint.loader import LoadedCheckpoint, load_newest
from trireme_trainer.checkpoint.manifest import Manifest, check_meta
from trireme_trainer.checkpoint.ranks import Ranks, describe
from trireme_trainer.checkpoint.staging import Staged, Stager
from trireme_trainer.checkpoint.state import flatten
from trireme_trainer.checkpoint.store import Candidate, CheckpointStore

log = logging.getLogger(__name__)
STAGES = (
    "staged", "opened", "writing", "written", "gathered", "manifest-half", "manifest", "fenced", "renamed", "committed",
    "trashed", "retained",
)  # fmt: skip
"""What `on_stage` is called with, in order; "manifest-half" to "renamed", "trashed" and "retained" on rank 0 only."""


@dataclass
class SaveTiming:
    """Seconds of one save on this rank. Training waits for `waiting` and `staging`; the rest runs beside it."""

    step: int
    waiting: float
    """For the save before, if that was still being written."""
    staging: float
    writing: float = 0.0
    """This rank's files and waiting for the other ranks' (hash and fsync included)."""
    committing: float = 0.0
    retaining: float = 0.0
    size: int = 0
    """Bytes staged by this rank."""

    @property
    def blocked(self) -> float:
        return self.waiting + self.staging

    @property
    def total(self) -> float:
        return self.staging + self.writing + self.committing + self.retaining


@dataclass
class _InFlight:
    step: int
    timing: SaveTiming
    thread: threading.Thread = field(default_factory=threading.Thread)
    ref: CheckpointRef | None = None
    error: CheckpointError | None = None


class Checkpointer:
    """Saves and loads the state of all ranks of one attempt. Every rank makes one, and calls it in the same order.

    The group it works on is its own (gloo): its background thread never meets a collective of the training loop.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        attempt: int,
        keep: int = 3,
        owner: str = "",
        process_group: dist.ProcessGroup | None = None,
        max_failures: int = 3,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Fences off older attempts. Collective. Raises StaleAttempt, or CheckpointError for an unwritable root.

        `owner`: identity of the job (its UID); see fence.py. `process_group`: a gloo group of all ranks for this alone.
        `max_failures`: so many failed saves in a row make `save` raise. `on_stage`: called with each of STAGES.
        """
        if keep < 1:
            raise ValueError(f"keep: at least 1 checkpoint must be kept, got {keep}")
        self._store = store
        self._attempt = attempt
        self._keep = keep
        self._max_failures = max_failures
        self._on_stage = on_stage or (lambda _stage: None)
        self._ranks = Ranks(process_group)
        self._stager = Stager()
        self._in_flight: _InFlight | None = None
        self._news: list[CheckpointRef] = []
        self._failures: list[SaveFailed] = []
        self._failed_in_a_row = 0
        self._last_failure = ""
        self._stale: StaleAttempt | None = None
        self._newest: int | None = None
        self._bad: set[int] = set()
        self.timings: deque[SaveTiming] = deque(maxlen=1000)
        self._fence, self.abandoned = self._ranks.on_first(lambda: store.claim(attempt, owner))
        """`abandoned`: paths of saves of earlier attempts that were cut short; they never counted and are gone now."""

    # --- loading ---

    def newest(self) -> int | None:
        """The step of the newest committed checkpoint by its name alone: nothing of it is read. Collective."""
        return self._ranks.on_first(lambda: max((c.step for c in self._store.candidates()), default=None))

    def load(
        self,
        state: Mapping[str, Any],
        *,
        strict: bool = True,
        known: CheckpointRef | None = None,
        at_most: int | None = None,
        newer_than: int = -1,
    ) -> LoadedCheckpoint | None:
        """Fills the tensors of `state` in place from the newest good checkpoint of whatever world size. Collective.

        None: nothing was ever committed. Raises NoUsableCheckpoint when something was and none of it is good (the
        tensors may then be half overwritten), IncompatibleCheckpoint when the newest good one holds other tensors.
        `strict=False` leaves tensors alone that `state` does not ask for. `known`: a checkpoint that was announced
        before; with it an empty root is an error too (a wrong or lost volume), not a fresh start. `at_most` and
        `newer_than`: only steps up to the one and beyond the other count.
        """
        self._settle()
        flat = flatten(state)
        try:
            loaded = load_newest(
                self._store, self._ranks, flat, strict=strict, at_most=at_most, newer_than=newer_than
            )
        except NoUsableCheckpoint as error:
            self._bad |= set(error.steps)
            raise
        if loaded is None and known is not None:
            raise NoUsableCheckpoint(
                f"{self._store.files.path('')}: no checkpoint here, but {known.path} (step {known.step}) was "
                "committed; is the right volume mounted?"
            )
        if loaded is None:
            return None
        self._bad = {rejected.candidate.step for rejected in loaded.rejected}
        for rejected in loaded.rejected:
            # What could merely not be read now may be fine tomorrow: that stays where it is.
            if rejected.damaged and self._ranks.rank == 0:
                self._store.set_aside(rejected.candidate, self._fence, str(rejected))
        self._newest = loaded.step
        return loaded

    def rewind(self, state: Mapping[str, Any], at_most: int) -> LoadedCheckpoint | None:
        """Goes back in place: like `load`, from the newest good checkpoint of no step after `at_most`. Collective.

        Later checkpoints are set aside: the history they belong to did not happen, and their steps will be saved anew.
        A save in flight is waited for first. None: there is none that early.
        """
        self._settle()
        self._newest = None
        self._ranks.on_first(lambda: self._set_aside_after(at_most))
        return self.load(state, at_most=at_most)

    def _set_aside_after(self, step: int) -> None:
        for candidate in self._store.candidates():
            if candidate.step > step:
                self._store.set_aside(candidate, self._fence, f"training went back to step {step} or before")

    # --- saving ---

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
        """Copies the state and returns; writing and commit go on in the background. At most one save is in flight.

        `state`: nested mapping with tensors (DTensors stay sharded) as leaves; `meta`: JSON-able, rank 0's counts.
        False: this step is committed already, or was just loaded, and nothing is done. Raises StaleAttempt, SaveFailed
        after `max_failures` failed saves in a row, TypeError or ValueError for a state or meta that cannot be saved.
        """
        started = time.perf_counter()
        self._settle()
        if self._failed_in_a_row >= self._max_failures:
            raise SaveFailed(f"{self._failed_in_a_row} saves failed in a row, the last with: {self._last_failure}")
        if step == self._newest:
            return False
        waited = time.perf_counter()
        kept_meta = check_meta(meta)
        staged = self._stager.stage(flatten(state), self._ranks.rank == 0)
        self._on_stage("staged")
        timing = SaveTiming(step, waited - started, time.perf_counter() - waited, size=staged.size)
        flight = _InFlight(step, timing)
        flight.thread = threading.Thread(
            target=self._write, args=(flight, staged, kept_meta), name=f"checkpoint-{step}", daemon=True
        )
        self._in_flight = flight
        flight.thread.start()
        return True

    @property
    def saving(self) -> bool:
        """Whether a save is in flight on this rank; ranks may differ for a moment."""
        return self._in_flight is not None and self._in_flight.thread.is_alive()

    def poll(self) -> list[CheckpointRef]:
        """Checkpoints committed since the last call; never waits. Raises StaleAttempt. For failed saves: `failures`."""
        if self._in_flight is not None and not self._in_flight.thread.is_alive():
            self._collect(self._in_flight)
        if self._stale is not None:
            raise self._stale
        news, self._news = self._news, []
        return news

    def failures(self) -> list[SaveFailed]:
        """Failed saves since the last call; training may go on, the last good checkpoint is untouched."""
        failures, self._failures = self._failures, []
        return failures

    def wait(self) -> None:
        """Until nothing is in flight. Raises StaleAttempt, or SaveFailed when the newest save was not committed."""
        self._settle()
        if self._failed_in_a_row:
            raise SaveFailed(self._last_failure)

    def close(self, *, wait: bool = True) -> None:
        """`wait=False` on the way out after an error: the save in flight is abandoned, as a kill would."""
        if wait and self._in_flight is not None:
            self._in_flight.thread.join()
            self._collect(self._in_flight)
        if self._in_flight is None:
            self._ranks.close()

    # --- the background thread ---

    def _write(self, flight: _InFlight, staged: Staged, meta: dict[str, Any]) -> None:
        try:
            flight.ref = self._protocol(flight, staged, meta)
        except CheckpointError as error:
            flight.error = error
        except BaseException as error:
            flight.error = SaveFailed(f"rank {self._ranks.rank}: {describe(error)}")

    def _protocol(self, flight: _InFlight, staged: Staged, meta: dict[str, Any]) -> CheckpointRef:
        store, ranks, timing = self._store, self._ranks, flight.timing
        mark = time.perf_counter()
        there, working = ranks.on_first(lambda: store.begin(flight.step, self._fence, bad=self._bad))
        if there is not None:
            return CheckpointRef(step=there.step, path=there.path)
        try:
            self._on_stage("opened")
            written = dcp.write(store.files, working, staged, ranks, self._on_stage)
            self._on_stage("written")
            ranks.everywhere(lambda: store.files.sync(working))
            everyone = ranks.everywhere(lambda: written)
            self._on_stage("gathered")
            timing.writing, mark = _lap(mark)
            manifest = Manifest(
                step=flight.step,
                attempt=self._attempt,
                world_size=ranks.world,
                created=time.time(),
                versions=versions(),
                files=tuple(sorted((entry for entries in everyone for entry in entries), key=lambda entry: entry.name)),
                meta=meta,
            )
            committed, new = ranks.on_first(lambda: self._commit(flight, working, manifest))
        except BaseException:
            # A peer that died after the commit must not make this rank deny, let alone remove, what is committed.
            if flight.ref is not None:
                return flight.ref
            if ranks.rank == 0:
                store.discard(working)
            raise
        self._on_stage("committed")
        timing.committing, mark = _lap(mark)
        if not new and ranks.rank == 0:
            log.info("%s: committed before, kept", committed.path)
        if ranks.rank == 0:
            self._retain()
        timing.retaining, mark = _lap(mark)
        return CheckpointRef(step=committed.step, path=committed.path)

    def _commit(self, flight: _InFlight, working: str, manifest: Manifest) -> tuple[Candidate, bool]:
        done = self._store.commit(working, manifest, self._fence, bad=self._bad, on_stage=self._on_stage)
        flight.ref = CheckpointRef(step=done[0].step, path=done[0].path)
        return done

    def _retain(self) -> None:
        try:
            for gone in self._store.retain(self._keep, self._fence, bad=self._bad, on_stage=self._on_stage):
                log.info("%s: removed, %d newer ones are kept", gone.path, self._keep)
        except (OSError, CheckpointError) as error:
            log.warning("%s: old checkpoints could not be removed (%s)", self._store.files.path(""), describe(error))
        self._on_stage("retained")

    # --- outcomes ---

    def _settle(self) -> None:
        """Joins the save in flight. After it every rank knows the same outcomes, and so decides the same."""
        if self._in_flight is not None:
            self._in_flight.thread.join()
            self._collect(self._in_flight)
        if self._stale is not None:
            raise self._stale

    def _collect(self, flight: _InFlight) -> None:
        self._in_flight = None
        if flight.ref is not None:
            self._failed_in_a_row = 0
            self._newest = flight.step
            self._bad.discard(flight.step)
            self._news.append(flight.ref)
            self.timings.append(flight.timing)
        elif isinstance(flight.error, StaleAttempt):
            self._stale = flight.error
        else:
            self._failed_in_a_row += 1
            self._last_failure = f"step {flight.step} was not saved: {flight.error}"
            self._failures.append(SaveFailed(self._last_failure))
            if self._ranks.rank == 0:
                log.error("%s; earlier checkpoints are untouched", self._last_failure)


def versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("trireme")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"  # run from a source tree that is not installed
    return {"trireme": own, "torch": torch.__version__, "python": platform.python_version()}


def _lap(mark: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - mark, now
