"""What can go wrong with a checkpoint. Every text is one line that names the place and the remedy."""

from __future__ import annotations


class CheckpointError(Exception):
    """Saving or loading cannot go on."""


class SaveFailed(CheckpointError):
    """A save did not become a committed checkpoint; the ones committed before it are untouched."""


class StaleAttempt(CheckpointError):
    """A newer attempt owns the checkpoint directory: this one must stop, and nothing it writes counts."""


class NoUsableCheckpoint(CheckpointError):
    """Checkpoints exist and none is good. Starting afresh would silently throw the training away."""

    steps: tuple[int, ...] = ()
    """Of those that were tried."""


class IncompatibleCheckpoint(CheckpointError):
    """The checkpoint is whole, but of another model or optimiser: an older one would not help."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that must not be loaded: a file is missing, short, changed or malformed."""
