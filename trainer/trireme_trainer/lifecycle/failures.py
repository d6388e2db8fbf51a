"""From an exception to what it means for the job: which exit code, which cause, one line of text."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from trireme_trainer.checkpoint import CheckpointError, IncompatibleCheckpoint
from trireme_trainer.data.errors import DataError
from trireme_trainer.lifecycle.outcome import (
    BadData,
    BadRecipe,
    CheckpointFailed,
    Crash,
    OutOfMemory,
    PeerLost,
    TrainingEnd,
)
from trireme_trainer.storage import StorageError

# What gloo and NCCL say when the other side is gone: they raise plain RuntimeErrors.
_PEER_GONE = re.compile(
    r"closed by peer|connection reset|connection refused|broken pipe|gloo.*(timed? ?out|timeout)|timed out waiting|"
    r"Socket Timeout|remote process exited|NCCL (communicator was aborted|error)|ncclRemoteError|read_op|write_op",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|DefaultCPUAllocator", re.IGNORECASE)


def classify(error: BaseException) -> TrainingEnd:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TrainingEnd):
        return error
    if isinstance(error, IncompatibleCheckpoint):
        return BadRecipe(text)
    if isinstance(error, CheckpointError):
        return CheckpointFailed(text)
    if isinstance(error, DataError):
        return BadData(text)
    if isinstance(error, StorageError):
        return BadRecipe(text)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(text):
        return OutOfMemory(
            f"out of memory ({text[:300]}); lower batch.micro, set activationCheckpointing, or shard over more ranks"
        )
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _PEER_GONE.search(text)):
        return PeerLost(f"lost a peer: {text[:500]}")
    return Crash(f"{type(error).__name__}: {text}")
