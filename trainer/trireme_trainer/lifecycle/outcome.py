"""How a rank ends other than by success: one exception per meaning, each with its exit code and cause."""

from __future__ import annotations

import signal

from trireme_api.protocol import Cause, ExitCode


class TrainingEnd(Exception):
    """Ends this rank with `code`. The text is one line that a person can act on."""

    code: int = 1
    cause: Cause = Cause.UNKNOWN


class BadRecipe(TrainingEnd):
    code = ExitCode.BAD_RECIPE
    cause = Cause.USER_ERROR


class BadData(TrainingEnd):
    code = ExitCode.BAD_DATA
    cause = Cause.DATA


class NonFinite(TrainingEnd):
    """Loss or gradient norm was not finite, past what `stability` allows."""

    code = ExitCode.NON_FINITE
    cause = Cause.NON_FINITE


class CheckpointFailed(TrainingEnd):
    code = ExitCode.CHECKPOINT_IO
    cause = Cause.INFRASTRUCTURE


class PeerLost(TrainingEnd):
    """A collective failed because another rank is gone: this rank is a victim, not the root cause."""

    code = 1
    cause = Cause.NETWORK


class Stopped(TrainingEnd):
    """Stopped on request with nowhere to save to: not 75, for nothing was saved."""

    code = 128 + signal.SIGTERM
    cause = Cause.PREEMPTION


class OutOfMemory(TrainingEnd):
    code = 1
    cause = Cause.OOM


class Crash(TrainingEnd):
    """Anything nobody foresaw; its traceback goes with it."""
