"""A damaged checkpoint is never loaded: the load names the file and the reason, and takes the one before."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint_worker import expected, run_cases
from trireme_trainer.checkpoint import Checkpointer, CheckpointStore, NoUsableCheckpoint
from trireme_trainer.checkpoint.files import PosixFiles
from trireme_trainer.checkpoint.manifest import FileEntry, Manifest

SHARD = "__0_0.distcp"


def fill(root: Path, steps: int = 2) -> None:
    checkpointer = Checkpointer(CheckpointStore(str(root)), attempt=1)
    for step in range(1, steps + 1):
        checkpointer.save(step, {"w": torch.full((64, 16), float(step))}, {"step": step})
    checkpointer.wait()
    checkpointer.close()


def flip(path: Path) -> None:
    """Two neighbouring bytes, in the tensor data of a shard: torch alone loads that without a word."""
    data = bytearray(path.read_bytes())
    offset = len(data) // 2
    data[offset] ^= 0xFF
    data[offset + 1] ^= 0xFF
    path.write_bytes(data)


def resign(directory: Path) -> None:
    """What someone who can write the files can do: a manifest that fits the changed files."""
    import hashlib

    old = Manifest.from_bytes((directory / "MANIFEST.json").read_bytes())
    entries = []
    for entry in old.files:
        data = (directory / entry.name).read_bytes()
        entries.append(FileEntry(entry.name, len(data), hashlib.sha256(data).hexdigest()))
    fields = {**vars(old), "files": tuple(entries)}
    (directory / "MANIFEST.json").write_bytes(Manifest(**fields).to_bytes())


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ.get('ATTACK_MARK', '/nonexistent/mark')}",)


def malicious(directory: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(Attack()))
    resign(directory)


def escaping(directory: Path) -> None:
    """.metadata that sends the reader to a file outside of the checkpoint."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../step-00000001/{SHARD}"
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    resign(directory)


def linked(directory: Path) -> None:
    shutil.move(directory / SHARD, directory.parent / "elsewhere")
    (directory / SHARD).symlink_to(directory.parent / "elsewhere")


def edited(directory: Path) -> None:
    path = directory / "MANIFEST.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def outside(directory: Path) -> None:
    old = Manifest.from_bytes((directory / "MANIFEST.json").read_bytes())
    files = (*old.files, FileEntry("../secret", 1, "0" * 64))
    (directory / "MANIFEST.json").write_bytes(Manifest(**{**vars(old), "files": files}).to_bytes())


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda d: cut(d / SHARD, 2000), rf"{SHARD}: truncated: 2000 bytes, the manifest says \d+"),
    "grown shard": (lambda d: (d / SHARD).open("ab").write(b"x"), f"{SHARD}: too long"),
    "two flipped bytes": (lambda d: flip(d / SHARD), f"{SHARD}: content changed: sha256"),
    "missing shard": (lambda d: (d / SHARD).unlink(), f"{SHARD}: missing"),
    "shard is a link": (linked, f"{SHARD}: cannot be read|{SHARD}: not a regular file"),
    "missing manifest": (lambda d: (d / "MANIFEST.json").unlink(), "MANIFEST.json: manifest is missing"),
    "torn manifest": (lambda d: cut(d / "MANIFEST.json", 200), "MANIFEST.json: torn manifest: not JSON"),
    "empty manifest": (lambda d: cut(d / "MANIFEST.json", 0), "torn manifest: not JSON .*0 bytes"),
    "edited manifest": (edited, "manifest was changed after it was written"),
    "manifest is a list": (lambda d: (d / "MANIFEST.json").write_text("[1]"), "manifest is not a JSON object"),
    "manifest names outside": (outside, r"'../secret', which is not a plain file name"),
    "unreadable metadata": (lambda d: (cut(d / ".metadata", 100), resign(d)), r"\.metadata is unreadable"),
    "metadata runs code": (malicious, r"\.metadata is unreadable .*system has no place in a checkpoint"),
    "metadata leads outside": (escaping, "which the manifest does not list"),
    "manifest of another step": (
        lambda d: shutil.copy(d.parent / "step-00000001/MANIFEST.json", d / "MANIFEST.json"),
        "manifest is of step 1, the directory of step 2",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_is_loaded_and_the_reason_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATTACK_MARK", str(tmp_path / "attacked"))
    root = tmp_path / "root"
    fill(root)
    damage, reason = DAMAGE[kind]
    damage(root / "step-00000002")
    state = {"w": torch.zeros(64, 16)}
    checkpointer = Checkpointer(CheckpointStore(str(root)), attempt=2)
    with caplog.at_level(logging.ERROR):
        loaded = checkpointer.load(state)
    assert loaded is not None
    assert loaded.step == 1
    assert (state["w"] == 1).all()
    [(path, told)] = loaded.skipped
    assert path == str(root / "step-00000002")
    import re

    assert re.search(reason, told), told
    assert told in caplog.text
    assert not (tmp_path / "attacked").exists(), "nothing in a checkpoint is executed"
    # Written again at the same step, it takes the place of the bad one.
    checkpointer.save(2, {"w": torch.full((64, 16), 20.0)}, {})
    checkpointer.wait()
    again = Checkpointer(CheckpointStore(str(root)), attempt=3).load(state)
    assert again is not None
    assert again.step == 2
    assert again.skipped == []
    assert (state["w"] == 20).all()


def test_the_attack_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own reader runs what the test above plants; without that, that test would prove nothing."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    monkeypatch.setenv("ATTACK_MARK", str(tmp_path / "attacked"))
    fill(tmp_path / "root")
    malicious(tmp_path / "root/step-00000002")
    with pytest.raises(CheckpointException):
        dcp.load({"w": torch.zeros(64, 16)}, checkpoint_id=tmp_path / "root/step-00000002")
    assert (tmp_path / "attacked").exists()


def test_flipped_bytes_are_silent_without_the_manifest(tmp_path: Path) -> None:
    """Why every byte is hashed: torch.distributed.checkpoint has no checksum of its own."""
    import torch.distributed.checkpoint as dcp

    fill(tmp_path)
    flip(tmp_path / "step-00000002" / SHARD)
    state = {"w": torch.zeros(64, 16)}
    dcp.load(state, checkpoint_id=tmp_path / "step-00000002")
    assert (state["w"] != 2).sum() in (1, 2)


def test_damaged_ones_are_set_aside_only_for_a_good_one(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    flip(tmp_path / "step-00000003" / SHARD)
    flip(tmp_path / "step-00000002" / SHARD)
    state = {"w": torch.zeros(64, 16)}
    loaded = Checkpointer(CheckpointStore(str(tmp_path)), attempt=2).load(state)
    assert loaded is not None
    assert [Path(path).name for path, _ in loaded.skipped] == ["step-00000003", "step-00000002"]
    names = sorted(d.name for d in tmp_path.iterdir() if d.is_dir())
    assert names == ["step-00000001", "step-00000002.attempt-2.bad", "step-00000003.attempt-2.bad"]
    reason = json.loads((tmp_path / "step-00000003.attempt-2.bad/BAD.json").read_text())["reason"]
    assert "content changed" in reason


def test_none_good_is_an_error_never_a_fresh_start(tmp_path: Path) -> None:
    fill(tmp_path)
    for step in (1, 2):
        flip(tmp_path / f"step-{step:08d}" / SHARD)
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=2)
    for _ in range(2):  # and it stays so: nothing was moved
        with pytest.raises(NoUsableCheckpoint, match=r"none of 2 checkpoints is usable .*restore one from a copy"):
            checkpointer.load({"w": torch.zeros(64, 16)})


def test_an_empty_root_is_a_fresh_start_unless_a_checkpoint_is_known(tmp_path: Path) -> None:
    from trireme_api.protocol import CheckpointRef

    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1)
    assert checkpointer.load({"w": torch.zeros(1)}) is None
    with pytest.raises(NoUsableCheckpoint, match="is the right volume mounted"):
        checkpointer.load({"w": torch.zeros(1)}, known=CheckpointRef(step=5, path="/mnt/pvc/old/step-00000005"))


def test_what_cannot_be_read_now_is_passed_over_but_stays(tmp_path: Path) -> None:
    fill(tmp_path)

    class FailingDisk(PosixFiles):
        def open_read(self, directory: str, name: str) -> IO[bytes]:
            if directory == "step-00000002" and name == SHARD:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().open_read(directory, name)

    state = {"w": torch.zeros(64, 16)}
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path), files=FailingDisk(str(tmp_path))), attempt=2, keep=1)
    loaded = checkpointer.load(state)
    assert loaded is not None
    assert loaded.step == 1
    assert "Input/output error" in loaded.skipped[0][1]
    assert (tmp_path / "step-00000002").is_dir(), "it may be fine tomorrow"
    checkpointer.save(3, state, {})
    checkpointer.wait()
    assert (tmp_path / "step-00000002").is_dir(), "retention does not count or take it"
    assert not (tmp_path / "step-00000001").exists()


def test_a_disk_that_fails_after_verification(tmp_path: Path) -> None:
    """The second read of a shard, the one that fills the tensors."""
    fill(tmp_path)

    class DyingDisk(PosixFiles):
        reads = 0

        def open_read(self, directory: str, name: str) -> IO[bytes]:
            self.reads += (directory, name) == ("step-00000002", SHARD)
            if self.reads == 2:
                self.reads += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().open_read(directory, name)

    state = {"w": torch.zeros(64, 16)}
    loaded = Checkpointer(CheckpointStore(str(tmp_path), files=DyingDisk(str(tmp_path))), attempt=2).load(state)
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.skipped == [
        (str(tmp_path / "step-00000002"), f"{tmp_path}/step-00000002: rank 0: OSError: [Errno 5] Input/output error")
    ]


def test_all_ranks_decide_alike_when_only_one_sees_the_damage(tmp_path: Path) -> None:
    """Each of 3 ranks verifies its share of 4 writers' files; damage in any one file is every rank's reason."""
    root = str(tmp_path / "origin")
    run_cases([{"mode": "save", "uri": root, "world": 4, "attempt": 1, "steps": [1, 2]}])
    shards = sorted(path.name for path in (tmp_path / "origin/step-00000002").glob("*.distcp"))
    assert len(shards) == 4
    cases = []
    for i, shard in enumerate([*shards, ".metadata"]):
        shutil.copytree(root, tmp_path / f"copy-{i}")
        flip(tmp_path / f"copy-{i}" / "step-00000002" / shard)
        cases.append({"mode": "load", "uri": str(tmp_path / f"copy-{i}"), "world": 3, "attempt": 2})
    for shard, ranks in zip([*shards, ".metadata"], run_cases(cases), strict=True):
        for rank in ranks:
            assert rank["step"] == 1
            assert rank["digest"] == expected(1)
            [(path, reason)] = rank["skipped"]
            assert path.endswith("step-00000002")
            assert f"{shard}: content changed" in reason
