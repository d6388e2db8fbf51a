"""A request to save and stop: SIGTERM, or a file the agent makes. It only raises a flag; ranks agree on the step."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._signalled = False

    def listen(self) -> StopRequest:
        """Takes over SIGTERM and SIGINT; main thread only. A second SIGINT acts as usual, for a person who means it."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        return self

    @property
    def requested(self) -> bool:
        return self._signalled or (self._file is not None and self._file.exists())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
