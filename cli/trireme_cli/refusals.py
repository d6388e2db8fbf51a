"""How a command ends whose data or checkpoint cannot serve: one line, and a code that says which of them. And what it
does about options that mean nothing beside the others: it does not pass them over."""

from __future__ import annotations

from collections.abc import Iterable

import click
from trireme_api.protocol import ExitCode


class BadData(click.ClickException):
    exit_code = int(ExitCode.BAD_DATA)


class CheckpointProblem(click.ClickException):
    exit_code = int(ExitCode.CHECKPOINT_IO)


def given(name: str) -> bool:
    """Whether a parameter of the command that runs was written on its command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def refuse(names: Iterable[str], why: str) -> None:
    """Raises UsageError for the first of these options that was given."""
    for name in names:
        if given(name):
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")
