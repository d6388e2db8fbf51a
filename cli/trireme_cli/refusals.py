"""How a command ends whose data or checkpoint cannot serve: one line, and a code that says which of them."""

from __future__ import annotations

import click
from trireme_api.protocol import ExitCode


class BadData(click.ClickException):
    exit_code = int(ExitCode.BAD_DATA)


class CheckpointProblem(click.ClickException):
    exit_code = int(ExitCode.CHECKPOINT_IO)
