"""A checkpoint root: what is committed in it, committing, verifying, setting aside, retention. No torch in here.

All of it may be cut short at any line by a kill: docs/checkpoints.md tells what survives where.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from trireme_trainer.checkpoint import fence as fences
from trireme_trainer.checkpoint.errors import CheckpointError, DamagedCheckpoint, SaveFailed
from trireme_trainer.checkpoint.fence import Fence
from trireme_trainer.checkpoint.files import Files, ObjectFiles, PosixFiles
from trireme_trainer.checkpoint.layout import MANIFEST, Kind, parse
from trireme_trainer.checkpoint.manifest import MAX_BYTES, FileEntry, Manifest
from trireme_trainer.checkpoint.verify import Problem, check_files, share
from trireme_trainer.storage import StorageError, is_local, open_filesystem, resolve_path

log = logging.getLogger(__name__)
KEEP_BAD = 1
"""Damaged checkpoints kept for a look; older ones go with retention."""


@dataclass(frozen=True)
class Candidate:
    """A directory that was committed; whether it is still good is another matter."""

    step: int
    directory: str
    path: str


def _no_stage(_stage: str) -> None:
    pass


class CheckpointStore:
    """Checkpoints under one URI: a path, pvc://claim/dir, file://…, or any fsspec URL.

    `files` replaces what the URI would give, e.g. a filesystem with faults in a test.
    """

    def __init__(self, uri: str, *, files: Files | None = None) -> None:
        self.uri = uri
        self.files: Files = files or _files(uri)

    # --- looking ---

    def exists(self) -> bool:
        """Whether anything was ever written here."""
        return self.files.exists()

    def candidates(self) -> list[Candidate]:
        """Newest first. Raises CheckpointError when the root cannot be listed."""
        try:
            found = self.files.committed()
        except Exception as error:  # drivers of object stores have exceptions of their own
            raise CheckpointError(f"{self.files.path('')}: cannot be listed ({error})") from None
        return [Candidate(step, found[step], self.files.path(found[step])) for step in sorted(found, reverse=True)]

    def find(self, step: int) -> Candidate | None:
        return next((c for c in self.candidates() if c.step == step), None)

    def manifest(self, candidate: Candidate) -> Manifest:
        """Raises DamagedCheckpoint (missing, torn, changed) or OSError (cannot be read now)."""
        try:
            marker = self.files.marker(candidate.directory)
            with self.files.open_read(candidate.directory, MANIFEST) as stream:
                data = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise DamagedCheckpoint("manifest is missing") from None
        if marker is not None and marker != hashlib.sha256(data).hexdigest():
            raise DamagedCheckpoint("manifest is not the one that was committed")
        manifest = Manifest.from_bytes(data)
        if manifest.step != candidate.step:
            raise DamagedCheckpoint(f"manifest is of step {manifest.step}, the directory of step {candidate.step}")
        return manifest

    def inspect(self, candidate: Candidate) -> tuple[Manifest | None, Problem | None]:
        """The manifest, or what is wrong with it."""
        where = f"{candidate.path}/{MANIFEST}"
        try:
            return self.manifest(candidate), None
        except DamagedCheckpoint as error:
            return None, Problem(where, str(error), True)
        except Exception as error:
            return None, Problem(where, f"cannot be read ({type(error).__name__}: {error})", False)

    def verify(self, candidate: Candidate, *, rank: int = 0, world: int = 1) -> list[Problem]:
        """Every file against the manifest: sizes and hashes. With a rank, only that rank's share of the files."""
        manifest, problem = self.inspect(candidate)
        if manifest is None:
            assert problem is not None
            return [problem]
        return self.verify_share(candidate, manifest, rank, world)

    def verify_share(self, candidate: Candidate, manifest: Manifest, rank: int, world: int) -> list[Problem]:
        return check_files(self.files, candidate.directory, share(manifest.files, rank, world))

    # --- writing: rank 0 of the attempt that holds the fence ---

    def claim(self, attempt: int, owner: str = "") -> tuple[Fence, list[str]]:
        """Fences older attempts off and removes what they left half done: the paths of saves that were cut short.

        Raises StaleAttempt, or CheckpointError when the root cannot be written.
        """
        abandoned = []
        try:
            fence = fences.claim(self.files, attempt, owner)
            for directory in self.files.leftovers():
                name = parse(directory)
                if name is not None and name.kind is not Kind.TRASH:
                    abandoned.append(self.files.path(directory))
                    log.warning("%s: a save that was cut short; it does not count and is removed", abandoned[-1])
                self.discard(directory)
        except CheckpointError:
            raise
        except Exception as error:
            where = self.files.path("")
            raise CheckpointError(f"{where}: cannot be written ({error}); checkpoint.uri must be writable") from None
        return fence, abandoned

    def begin(self, step: int, fence: Fence, *, bad: Collection[int] = ()) -> tuple[Candidate | None, str]:
        """A new, empty directory that ranks write this step into; or the committed checkpoint of this step.

        Raises StaleAttempt, so that a stale attempt does not write gigabytes for nothing.
        """
        fences.check(self.files, fence)
        there = self.find(step)
        if there is not None and step not in bad:
            return there, ""
        working = self.files.working(step, fence.attempt)
        if there is not None and there.directory == working:
            # In an object store a run without rising attempts meets its own bad checkpoint under the same name.
            self.files.withdraw(working, fence.attempt)
        with contextlib.suppress(FileNotFoundError):
            self.files.remove(working)
        self.files.make(working)
        return None, working

    def discard(self, working: str) -> None:
        """Best effort: a leftover is removed by the next attempt at the latest."""
        try:
            self.files.remove(working)
        except FileNotFoundError:
            pass
        except Exception as error:
            log.warning("%s: cannot be removed now (%s)", self.files.path(working), error)

    def commit(
        self,
        working: str,
        manifest: Manifest,
        fence: Fence,
        *,
        bad: Collection[int] = (),
        on_stage: Callable[[str], None] = _no_stage,
    ) -> tuple[Candidate, bool]:
        """Makes the written files count. Returns the committed checkpoint; False: one of this step was there before.

        `bad` are steps whose committed checkpoint this attempt found unusable: those are moved out of the way.
        Raises SaveFailed, StaleAttempt or OSError; then nothing was committed.
        """
        self._all_there(working, manifest.files)
        data = manifest.to_bytes()
        with self.files.create(working, MANIFEST) as stream:
            half = len(data) // 2
            stream.write(data[:half])
            stream.flush()
            on_stage("manifest-half")
            stream.write(data[half:])
        self.files.sync(working)
        on_stage("manifest")
        with self.files.lock():
            fences.check(self.files, fence)
            on_stage("fenced")
            there = self.find(manifest.step)
            if there is not None and manifest.step not in bad:
                self.discard(working)
                return there, False
            if there is not None:
                self.files.set_aside(there.directory, fence.attempt, "found unusable by a load, then written again")
            final = self.files.publish(working, hashlib.sha256(data).hexdigest())
            on_stage("renamed")
            self._still_mine(final, fence)
            self.files.sync("")
        return Candidate(manifest.step, final, self.files.path(final)), True

    def set_aside(self, candidate: Candidate, fence: Fence, reason: str) -> None:
        """Takes a checkpoint that must not be used out of the count; it stays on disk for a look. Best effort."""
        try:
            with self.files.lock():
                fences.check(self.files, fence)
                moved = self.files.set_aside(candidate.directory, fence.attempt, reason)
            log.warning("%s: set aside as %s (%s)", candidate.path, moved, reason)
        except (OSError, CheckpointError) as error:
            log.warning("%s: could not be set aside (%s)", candidate.path, error)

    def retain(
        self, keep: int, fence: Fence, *, bad: Collection[int] = (), on_stage: Callable[[str], None] = _no_stage
    ) -> list[Candidate]:
        """Removes committed checkpoints beyond the newest `keep`. Call it only after a commit. Returns what went.

        Only directories with a readable manifest count towards `keep`: a damaged one never displaces a good one.
        """
        removed = []
        kept = 0
        for candidate in self.candidates():
            manifest, _ = self.inspect(candidate)
            if manifest is None or candidate.step in bad:
                continue
            kept += 1
            if kept <= keep:
                continue
            with self.files.lock():
                fences.check(self.files, fence)
                trash = self.files.withdraw(candidate.directory, fence.attempt)
            on_stage("trashed")
            self.files.remove(trash)
            removed.append(candidate)
        by_step = sorted(self.files.bad(), key=lambda d: name.step if (name := parse(d)) else 0, reverse=True)
        for directory in by_step[KEEP_BAD:]:
            self.files.remove(directory)
        return removed

    def _still_mine(self, final: str, fence: Fence) -> None:
        """Where no lock holds (an object store), a rank may have frozen between the fence and the marker, and its files
        may be gone by now: what it has just published is taken back. Raises StaleAttempt."""
        try:
            fences.check(self.files, fence)
        except CheckpointError:
            self.files.withdraw(final, fence.attempt)
            raise

    def _all_there(self, working: str, entries: Collection[FileEntry]) -> None:
        for entry in entries:
            where = f"{self.files.path(working)}/{entry.name}"
            try:
                size = self.files.size(working, entry.name)
            except FileNotFoundError:
                raise SaveFailed(f"{where}: written by a rank, not seen by rank 0; do all nodes share it?") from None
            if size != entry.size:
                raise SaveFailed(f"{where}: {size} bytes here, {entry.size} were written")


def _files(uri: str) -> Files:
    try:
        if is_local(uri):
            return PosixFiles(resolve_path(uri))
        filesystem, path = open_filesystem(uri)
    except StorageError as error:
        raise CheckpointError(f"checkpoint.uri: {error}") from None
    return ObjectFiles(filesystem, path, uri)
