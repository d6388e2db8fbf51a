"""The one error of the data side; the trainer ends with exit code 65 on it, the command line prints it as one line."""

from __future__ import annotations


class DataError(ValueError):
    """Input or prepared data that cannot be used: names the path, what is wrong, and what would help."""
