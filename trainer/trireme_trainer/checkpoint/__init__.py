"""Checkpoints: committed by rename, verified by manifest, loadable at any world size. Format: docs/checkpoints.md.

Importing this package does not import torch; `Checkpointer` does when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trireme_trainer.checkpoint.errors import (
    CheckpointError,
    DamagedCheckpoint,
    IncompatibleCheckpoint,
    NoUsableCheckpoint,
    SaveFailed,
    StaleAttempt,
)
from trireme_trainer.checkpoint.store import Candidate, CheckpointStore

if TYPE_CHECKING:
    from trireme_trainer.checkpoint.checkpointer import Checkpointer, SaveTiming
    from trireme_trainer.checkpoint.loader import LoadedCheckpoint
    from trireme_trainer.checkpoint.memory import MemoryFolder
    from trireme_trainer.checkpoint.state import flatten, model_state
    from trireme_trainer.checkpoint.tiers import MemoryTier

_WITH_TORCH = {
    "Checkpointer": "checkpointer",
    "SaveTiming": "checkpointer",
    "LoadedCheckpoint": "loader",
    "MemoryFolder": "memory",
    "MemoryTier": "tiers",
    "flatten": "state",
    "model_state": "state",
}

__all__ = [
    "Candidate",
    "CheckpointError",
    "CheckpointStore",
    "Checkpointer",
    "DamagedCheckpoint",
    "IncompatibleCheckpoint",
    "LoadedCheckpoint",
    "MemoryFolder",
    "MemoryTier",
    "NoUsableCheckpoint",
    "SaveFailed",
    "SaveTiming",
    "StaleAttempt",
    "flatten",
    "model_state",
]


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
