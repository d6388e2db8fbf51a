"""Saves that must not or cannot commit: a full disk, a stale attempt, a broken store. What is committed stays."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint_worker import expected, run_cases
from trireme_trainer.checkpoint import Checkpointer, CheckpointError, CheckpointStore, SaveFailed, StaleAttempt
from trireme_trainer.checkpoint.files import PosixFiles


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((256, 256), float(step))}


class FullDisk(PosixFiles):
    full = False

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[IO[bytes]]:
        with super().create(directory, name) as stream:
            if self.full:
                stream.write(b"some of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield stream


def committed(root: Path) -> list[int]:
    return [candidate.step for candidate in CheckpointStore(str(root)).candidates()]


def test_failed_saves_between_good_ones_never_cost_the_last_good_one(tmp_path: Path) -> None:
    """keep=1 and more failures than that: counting directories instead of commits would delete step 1."""
    files = FullDisk(str(tmp_path))
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path), files=files), attempt=1, keep=1, max_failures=9)
    checkpointer.save(1, state(1), {})
    checkpointer.wait()
    files.full = True
    for step in range(2, 8):
        checkpointer.save(step, state(step), {})
        with pytest.raises(SaveFailed, match=f"step {step} was not saved: rank 0: OSError: .*No space left on device"):
            checkpointer.wait()
        assert committed(tmp_path) == [1]
        assert len(checkpointer.failures()) == 1
    files.full = False
    assert not list(tmp_path.glob("*.tmp")), "a failed save gives its space back"
    checkpointer.save(8, state(8), {})
    checkpointer.wait()
    assert committed(tmp_path) == [8]


def test_too_many_failures_in_a_row_end_training(tmp_path: Path) -> None:
    files = FullDisk(str(tmp_path))
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path), files=files), attempt=1, max_failures=2)
    files.full = True
    checkpointer.save(1, state(1), {})
    checkpointer.save(2, state(2), {})
    with pytest.raises(SaveFailed, match=r"2 saves failed in a row, the last with: step 2 .*No space left"):
        checkpointer.save(3, state(3), {})


def test_full_disk_of_one_rank_is_told_to_all(tmp_path: Path) -> None:
    uri = str(tmp_path)
    full = {"step": 2, "rank": 1, "after": 3000}
    saved, loaded = run_cases(
        [
            {"mode": "save", "uri": uri, "world": 2, "attempt": 1, "steps": [1, 2, 3], "keep": 5, "full": full},
            {"mode": "load", "uri": uri, "world": 2, "attempt": 2},
        ]
    )
    for rank in saved:
        assert rank["exit"] == 0, "training goes on"
        assert rank["committed"] == [1, 3]
        assert len(rank["failures"]) == 1
        assert "step 2 was not saved: rank 1: OSError: [Errno 28] No space left on device" in rank["failures"][0]
    assert committed(tmp_path) == [3, 1]
    assert loaded[0]["digest"] == expected(3)


def test_a_really_full_filesystem(tmp_path: Path) -> None:
    """On a tmpfs of 3 MB. Needs the right to mount."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here ({mounted.stderr.strip()}); the simulated full disk is tested above")
    try:
        checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1, keep=1)
        checkpointer.save(1, {"w": torch.ones(2**18)}, {})
        checkpointer.wait()
        checkpointer.save(2, {"w": torch.ones(2**20)}, {})
        with pytest.raises(SaveFailed, match="No space left on device"):
            checkpointer.wait()
        assert committed(tmp_path) == [1]
        checkpointer.save(3, {"w": torch.full((2**18,), 3.0)}, {})
        checkpointer.wait()
        target = {"w": torch.zeros(2**18)}
        loaded = Checkpointer(CheckpointStore(str(tmp_path)), attempt=2).load(target)
        assert loaded is not None
        assert loaded.step == 3
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_stale_attempt_is_refused_at_its_next_save(tmp_path: Path) -> None:
    old = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1)
    old.save(1, state(1), {})
    old.wait()
    new = Checkpointer(CheckpointStore(str(tmp_path)), attempt=2)
    old.save(2, state(2), {})
    with pytest.raises(StaleAttempt, match="attempt 1 is stale, attempt 2 has taken over"):
        old.wait()
    with pytest.raises(StaleAttempt):
        old.poll()
    with pytest.raises(StaleAttempt):
        old.save(3, state(3), {})
    assert committed(tmp_path) == [1]
    new.save(2, state(20), {})
    new.wait()
    assert committed(tmp_path) == [2, 1]


@pytest.mark.parametrize("stage", ["opened", "writing", "written", "gathered", "manifest"])
def test_an_attempt_overtaken_in_the_middle_of_a_save_does_not_commit(tmp_path: Path, stage: str) -> None:
    def overtake(reached: str) -> None:
        if reached == stage:
            Checkpointer(CheckpointStore(str(tmp_path)), attempt=2)

    old = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1, on_stage=overtake)
    old.save(1, state(1), {})
    # Its files may vanish under its hands, so it may hear either; it never commits.
    with pytest.raises((StaleAttempt, SaveFailed)):
        old.wait()
    assert committed(tmp_path) == []
    assert not list(tmp_path.glob("step-*"))


def test_an_attempt_overtaken_after_its_commit_deletes_nothing(tmp_path: Path) -> None:
    def overtake(reached: str) -> None:
        if reached == "committed" and len(committed(tmp_path)) == 2:
            Checkpointer(CheckpointStore(str(tmp_path)), attempt=2)

    old = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1, keep=1, on_stage=overtake)
    for step in (1, 2):
        old.save(step, state(step), {})
        old.wait()
    assert committed(tmp_path) == [2, 1], "the newer attempt may be loading it"


def test_a_lower_attempt_cannot_even_start(tmp_path: Path) -> None:
    Checkpointer(CheckpointStore(str(tmp_path)), attempt=5, owner="uid-a")
    with pytest.raises(StaleAttempt, match=r"delete .*fence.json"):
        Checkpointer(CheckpointStore(str(tmp_path)), attempt=4, owner="uid-a")
    Checkpointer(CheckpointStore(str(tmp_path)), attempt=5, owner="uid-a")


def test_a_job_made_anew_takes_over_and_the_old_one_is_told(tmp_path: Path) -> None:
    old = Checkpointer(CheckpointStore(str(tmp_path)), attempt=7, owner="uid-a")
    new = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1, owner="uid-b")
    old.save(1, state(1), {})
    with pytest.raises(
        StaleAttempt, match=r"another job \(uid-b, attempt 1\) took this checkpoint root over; give each"
    ):
        old.wait()
    new.save(1, state(1), {})
    new.wait()
    assert committed(tmp_path) == [1]


def test_storage_that_nodes_do_not_share_is_named(tmp_path: Path) -> None:
    class OtherNode(PosixFiles):
        def size(self, directory: str, name: str) -> int:
            if name == "__0_0.distcp":
                raise FileNotFoundError(name)
            return super().size(directory, name)

    checkpointer = Checkpointer(CheckpointStore(str(tmp_path), files=OtherNode(str(tmp_path))), attempt=1)
    checkpointer.save(1, state(1), {})
    with pytest.raises(
        SaveFailed, match=r"__0_0.distcp: written by a rank, not seen by rank 0; do all nodes share it\?"
    ):
        checkpointer.wait()


def test_an_unwritable_root_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .*checkpoint.uri must be writable"):
        Checkpointer(CheckpointStore(str(tmp_path / "file")), attempt=1)


def test_meta_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1)
    for meta in ({"loss": float("nan")}, {"model": object()}):
        with pytest.raises((TypeError, ValueError)):
            checkpointer.save(1, state(1), meta)
    assert not checkpointer.saving
    assert not list(tmp_path.glob("step-*"))
