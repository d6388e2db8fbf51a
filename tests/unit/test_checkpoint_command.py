"""`trireme checkpoints` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from trireme_cli.checkpoints import checkpoints
from trireme_trainer.checkpoint import CheckpointStore

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_checkpoint_store import write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(checkpoints, [str(argument) for argument in arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = CheckpointStore(str(tmp_path / "root"))
    fence, _ = store.claim(4)
    for step in (10, 20):
        write(store, step, fence)
    return tmp_path / "root"


def test_list(root: Path) -> None:
    (root / "step-00000030.attempt-4.tmp").mkdir()
    result = run("list", root)
    assert result.exit_code == 0
    header, newest, oldest, unfinished = result.stdout.splitlines()
    assert header.split() == ["STEP", "ATTEMPT", "RANKS", "FILES", "SIZE", "WRITTEN", "STATE"]
    assert newest.split()[:5] == ["20", "4", "1", "2", "5.9"]
    assert oldest.split()[0] == "10"
    assert unfinished.startswith("step-00000030.attempt-4.tmp: being written, or left by a save that was cut short")
    listed = json.loads(run("list", root, "--json").stdout)
    assert [c["step"] for c in listed["checkpoints"]] == [20, 10]
    assert listed["unfinished"] == ["step-00000030.attempt-4.tmp"]


def test_list_shows_damage_that_needs_no_reading_of_data(root: Path) -> None:
    (root / "step-00000020/MANIFEST.json").unlink()
    assert "manifest is missing" in run("list", root).stdout


def test_verify_good(root: Path) -> None:
    result = run("verify", root)
    assert result.exit_code == 0
    assert result.stdout.count(": good; 5.9 KiB in ") == 2
    verified = json.loads(run("verify", root, "--json", "--step", 10).stdout)
    assert [(c["step"], c["good"], c["bytes"]) for c in verified["checkpoints"]] == [(10, True, 6000)]


def test_verify_names_the_file_and_fails(root: Path) -> None:
    shard = root / "step-00000020/__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    result = run("verify", root)
    assert result.exit_code == 74
    assert f"{shard}: content changed" in result.stdout
    assert "step-00000010: good" in result.stdout
    assert "1 of 2 checkpoints not usable" in result.stderr
    as_json = run("verify", root, "--json")
    assert as_json.exit_code == 74
    assert [c["good"] for c in json.loads(as_json.stdout)["checkpoints"]] == [False, True]
    assert run("verify", root, "--step", 10).exit_code == 0


def test_mistakes_are_told_in_one_line(root: Path, tmp_path: Path) -> None:
    for arguments, words in [
        (("verify", root, "--step", 7), "no committed checkpoint of step 7"),
        (("verify", tmp_path / "nowhere"), "no checkpoint directory here"),
        (("list", tmp_path / "nowhere"), "no checkpoint directory here"),
        (("list", "pvc://nosuch/x"), "nosuch"),
        (("list", "nosuch://x"), "checkpoint.uri: nosuch://x"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 74
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert run("verify", root, "--step", "-1").exit_code == 2


def test_nothing_is_imported_that_could_run_a_checkpoint(root: Path) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom trireme_cli.checkpoints import checkpoints\n"
        f"assert CliRunner().invoke(checkpoints, ['verify', {str(root)!r}]).exit_code == 0\n"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
