"""A rank does not outlive what started it."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent() -> bool:
    """Has the kernel kill this process when its parent ends, however it ends; returns whether it agreed (Linux only).

    In a pod the agent is PID 1 and takes everything with it. Elsewhere (`trireme run`, tests) a killed agent would
    leave ranks that spin in a collective for ever.
    """
    try:
        return int(ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)) == 0
    except (OSError, AttributeError):
        return False
