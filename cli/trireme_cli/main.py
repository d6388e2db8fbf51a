"""The `trireme` command, also installed as the kubectl plugin `kubectl trireme`.

A command's module is imported only when that command is called, so that one part's dependencies are no burden on the
others: `trireme validate` starts without torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
from trireme_api.protocol import ExitCode
from trireme_api.schema import InvalidSpec

# Name → where the click command is, and its line in `--help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "models": ("trireme_cli.models:models", "Model presets with exact parameter counts."),
    "prepare": ("trireme_cli.prepare:prepare", "Turn a corpus of text into tokenised shards."),
    "validate": ("trireme_cli.validate:validate", "Check a TrainingJob or recipe without running it."),
    "plan": ("trireme_cli.plan:plan", "Memory, time, energy, carbon and failures of a run, before it."),
    "run": ("trireme_cli.run:run", "Train a recipe on this machine, without a cluster."),
    "checkpoints": ("trireme_cli.checkpoints:checkpoints", "List and verify the checkpoints of a job or directory."),
    "explain": ("trireme_cli.explain:command", "What a job does and why, what failed, what is next."),
    "top": ("trireme_cli.top:command", "All jobs in one live table."),
    "logs": ("trireme_cli.logs:command", "The output of all ranks of a job as one stream."),
    "report": ("trireme_cli.report.command:command", "The logbook of a run as one page."),
    "note": ("trireme_cli.notes:command", "Add a note to a job's logbook."),
    "evaluate": ("trireme_cli.evaluate:evaluate", "Held-out perplexity and tasks of a checkpoint or model."),
    "grow": ("trireme_cli.grow:grow", "Split experts of a growing model between two sessions."),
    "convert": ("trireme_cli.convert:convert", "To and from Hugging Face Transformers."),
}

_EXTRAS = {
    "trainer": {"torch", "numpy", "tokenizers", "sentencepiece", "safetensors", "fsspec"},
    "cli": {"kubernetes", "urllib3"},
    "operator": {"kopf", "aiohttp", "cryptography"},
}

_BAD_INPUT = int(ExitCode.BAD_RECIPE)
_FAILED = 1
_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose help needs no command's module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{module}:{attribute} is not a command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], list(COMMANDS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trireme", prog_name="trireme")
def cli() -> None:
    """Train large models on Kubernetes, or on this machine."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and exits: 0, 64 for bad input, 1 for anything the machine refused, each with one line on
    stderr. A command may return its own exit code as an int."""
    try:
        result = cli.main(args=args, prog_name=_program(), standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(_BAD_INPUT)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else _program()
        _end(f"{path}: {error.format_message()} (see {path} --help)", _BAD_INPUT)
    except click.ClickException as error:
        _end(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _end("interrupted", _INTERRUPTED)
    except InvalidSpec as error:
        _end(str(error), _BAD_INPUT)
    except BrokenPipeError:
        # The reader is gone (`trireme models | head`); the interpreter must not try to flush to it again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_FAILED)
    except OSError as error:
        _end(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), _FAILED)
    except ModuleNotFoundError as error:
        missing = _missing(error)
        if missing is None:
            raise
        _end(missing, _FAILED)
    sys.exit(result if isinstance(result, int) else 0)


def _program() -> str:
    return "kubectl trireme" if os.path.basename(sys.argv[0]).startswith("kubectl-") else "trireme"


def _missing(error: ModuleNotFoundError) -> str | None:
    """What to do about a module that is not there; None where that is a fault of ours."""
    name = error.name or ""
    package = name.partition(".")[0]
    for command, (target, _) in COMMANDS.items():
        if name == target.partition(":")[0]:
            return f"the command {command!r} is not part of this installation"
    for extra, packages in _EXTRAS.items():
        if package in packages:
            return f"this command needs the Python package {package!r}; pip install 'trireme[{extra}]'"
    return None


def _end(message: str, code: int) -> NoReturn:
    line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
    click.echo(f"error: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
