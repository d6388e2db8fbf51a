"""`trireme prepare` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from trireme_cli.prepare import prepare


def run(*arguments: object) -> Result:
    return CliRunner().invoke(prepare, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of the book about oar {i % 7}." for i in range(50)))
    return path


def prepare_book(text: Path, out: Path, *more: object) -> Result:
    return run(text, "-o", out, "--vocabulary", 300, "--document-separator", "blank-line", *more)


def test_prepare_then_verify(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prepare_book(text, out)
    assert result.exit_code == 0, result.output
    assert "documents    50 (1 held out)" in result.stdout
    assert "nats per token" in result.stdout
    assert "already prepared" in prepare_book(text, out).stdout
    verified = run("--verify", out)
    assert verified.exit_code == 0
    assert "5 files, all as written" in verified.stdout


def test_json_is_json(text: Path, tmp_path: Path) -> None:
    result = json.loads(prepare_book(text, tmp_path / "out", "--json").stdout)
    assert result["documents"] == 50
    assert result["fresh"] is True
    assert 0 < result["unigramEntropy"] < 6
    verified = json.loads(run("--verify", tmp_path / "out", "--json").stdout)
    assert verified["problems"] == []
    assert verified["fingerprint"] == result["fingerprint"]


def test_verify_names_every_damaged_file(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_book(text, out)
    for name, change in (("train-00000.tokens", b"\1"), ("tokenizer.json", b" ")):
        (out / name).write_bytes(change + (out / name).read_bytes()[1:])
    (out / "valid-00000.lengths").unlink()
    result = run("--verify", out)
    assert result.exit_code == 65
    assert "train-00000.tokens: corrupt" in result.stdout
    assert "tokenizer.json: corrupt" in result.stdout
    assert "valid-00000.lengths: missing" in result.stdout
    assert "3 of 5 files are not as written" in result.stderr
    assert len(json.loads(run("--verify", out, "--json").stdout)["problems"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no input: name files or directories of text"),
        (["book.txt"], 2, "--output DIR is required"),
        (["absent.txt", "-o", "out"], 65, "Error: absent.txt: no such file or directory"),
        (["empty.txt", "-o", "out"], 65, "Error: empty.txt: empty file; remove it or leave it out with --exclude"),
        (["bad.txt", "-o", "out"], 65, "Error: bad.txt: byte 0xff at offset 2 is not UTF-8 text"),
        (["book.txt", "-o", "pvc://absent/x"], 65, "Error: --output pvc://absent/x: claim 'absent' is not mounted"),
        (["--verify", "absent"], 65, "absent: no such directory; make one with: trireme prepare INPUT... --output"),
        (["--verify", "s3://x/y"], 65, "--verify s3://x/y: give a local directory or pvc://claim/dir"),
        (["book.txt", "--verify", "out"], 2, "--verify DIR takes no INPUT and no --output"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    text: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(text.parent)
    Path("empty.txt").touch()
    Path("bad.txt").write_bytes(b"ok\xff")
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].count("Error: ") == 1
    assert not Path("out").exists()


def test_overwrite_replaces(text: Path, tmp_path: Path) -> None:
    prepare_book(text, tmp_path / "out")
    assert run(text, "-o", tmp_path / "out", "--vocabulary", 280).exit_code == 65
    result = run(text, "-o", tmp_path / "out", "--vocabulary", 280, "--overwrite")
    assert result.exit_code == 0
    assert "nothing is held out: only 1 documents; cut them with --document-separator" in result.stdout


def test_only_the_command_needs_the_data_side() -> None:
    import subprocess
    import sys

    script = "import sys, trireme_cli.prepare; print([m for m in ('numpy', 'tokenizers', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"[]\n"
    script = "import sys, trireme_trainer.data.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"False\n"
