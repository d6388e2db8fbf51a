"""`trireme models`, and how the command line as a whole starts and fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from trireme_api.families import PRESETS
from trireme_api.schema import InvalidSpec
from trireme_cli import main as command_line


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trireme_cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_models_prints_every_preset_with_its_exact_count() -> None:
    done = _run("models")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(PRESETS)
    for line, (name, preset) in zip(lines[1:], PRESETS.items(), strict=True):
        count = preset.config.parameters()
        assert line.split()[:3] == [name, f"{count.total:,}", f"{count.activated:,}"]


def test_models_json_is_complete() -> None:
    listed = json.loads(_run("models", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(PRESETS)
    largest = next(entry for entry in listed if entry["name"] == "opt-175b")
    assert largest["parameters"] == {"total": 174_604_468_224, "activated": 174_604_468_224}
    assert largest["paper"]["batchTokens"] == 2_097_152
    assert largest["config"]["feedForwardWidth"] == 49152
    assert sum(largest["stateBytes"].values()) == 16 * 174_604_468_224
    assert largest["flopsPerToken"]["train"] == 3 * largest["flopsPerToken"]["forward"]


def test_models_and_help_start_without_torch() -> None:
    code = "import sys\nfrom trireme_cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'kubernetes' in sys.modules)"
    for argument in ("models", "--help"):
        subprocess.run([sys.executable, "-c", code, argument], check=True, capture_output=True)


def test_help_names_every_command() -> None:
    text = _run("--help").stdout
    for name, (_, line) in command_line.COMMANDS.items():
        assert name in text
        assert line in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["modles"], "did you mean 'models'?"),
        (["qqqqqq"], "there are: models"),
        (["models", "--jsn"], "--jsn"),
        (["models", "surplus"], "surplus"),
    ],
)
def test_bad_usage_is_one_line_and_64(args: list[str], words: str) -> None:
    done = _run(*args)
    assert done.returncode == 64
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_no_command_shows_the_help_and_64() -> None:
    done = _run()
    assert done.returncode == 64
    assert "Commands:" in done.stderr


@pytest.mark.parametrize("args", [["models"], ["models", "--json"]])
def test_a_reader_that_goes_away_gets_no_traceback(args: list[str]) -> None:
    command = [sys.executable, "-m", "trireme_cli.main", *args]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    message = writer.stderr.read()
    assert writer.wait(30) == 1
    assert message == b""


def _command(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def broken() -> object:
        return action()

    monkeypatch.setattr(command_line, "broken", broken, raising=False)
    monkeypatch.setitem(command_line.COMMANDS, "broken", ("trireme_cli.main:broken", "fails"))


def _raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


class _OwnCode(click.ClickException):
    exit_code = 65


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InvalidSpec("model.preset", "unknown"), 64, "error: model.preset: unknown"),
        (click.BadParameter("too big"), 64, "too big"),
        (FileNotFoundError(2, "No such file", "job.yaml"), 1, "error: job.yaml: No such file"),
        (OSError("first\nsecond"), 1, "error: first; second"),
        (_OwnCode("corpus is empty"), 65, "error: corpus is empty"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ModuleNotFoundError("no", name="torch"), 1, "pip install 'trireme[trainer]'"),
        (ModuleNotFoundError("no", name="kubernetes.aio"), 1, "pip install 'trireme[cli]'"),
        (ModuleNotFoundError("no", name="trireme_cli.prepare"), 1, "'prepare' is not part of this installation"),
    ],
)
def test_errors_are_one_line_with_a_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _command(_raising(error), monkeypatch)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["broken"])
    captured = capsys.readouterr()
    assert ended.value.code == code
    assert line in captured.err
    assert captured.err.strip().count("\n") == 0


def test_faults_of_our_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("bug"), ModuleNotFoundError("no", name="surprise")):
        _command(_raising(error), monkeypatch)
        with pytest.raises(type(error)):
            command_line.main(["broken"])


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75)])
def test_a_command_may_return_its_exit_code(result: object, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _command(lambda: result, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["broken"])
    assert ended.value.code == code
