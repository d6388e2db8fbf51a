"""Commit, verification, retention and the fence on plain files: no torch, no processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trireme_trainer.checkpoint import CheckpointError, CheckpointStore, DamagedCheckpoint, SaveFailed, StaleAttempt
from trireme_trainer.checkpoint.fence import Fence
from trireme_trainer.checkpoint.files import PosixFiles
from trireme_trainer.checkpoint.layout import Kind, Name, is_file_name, parse
from trireme_trainer.checkpoint.locks import exclusive
from trireme_trainer.checkpoint.manifest import FileEntry, Manifest, check_meta
from trireme_trainer.checkpoint.verify import share


@pytest.fixture(params=["filesystem", "object-store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "filesystem" else f"memory://{tmp_path.name}-{time.time_ns()}"


def write(store: CheckpointStore, step: int, fence: Fence, *, size: int = 3000, bad: tuple[int, ...] = ()) -> bool:
    """One checkpoint of two files; whether it was committed now."""
    there, working = store.begin(step, fence, bad=bad)
    if there is not None:
        return False
    entries = []
    for name in (".metadata", "__0_0.distcp"):
        data = f"{name}@{step}".encode().ljust(size, b".")
        with store.files.create(working, name) as stream:
            stream.write(data)
        entries.append(FileEntry(name, size, hashlib.sha256(data).hexdigest()))
    return store.commit(working, manifest(step, fence.attempt, tuple(entries)), fence, bad=bad)[1]


def manifest(step: int, attempt: int = 1, files: tuple[FileEntry, ...] = ()) -> Manifest:
    return Manifest(step, attempt, 1, 0.0, {}, files or (FileEntry(".metadata", 1, "0" * 64),), {"step": step})


def steps(store: CheckpointStore) -> list[int]:
    return [candidate.step for candidate in store.candidates()]


# --- names ---


@given(st.integers(0, 10**12 - 1), st.none() | st.integers(0, 10**9 - 1), st.sampled_from(Kind))
def test_names_round_trip(step: int, attempt: int | None, kind: Kind) -> None:
    name = Name(step, attempt, kind)
    assert parse(str(name)) == name


@pytest.mark.parametrize("name", ["step-1", "step-00000001x", "logs", "step-00000001.attempt-1.tmp.tmp", ""])
def test_directories_of_others_are_not_ours(name: str) -> None:
    assert parse(name) is None


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\0", "-rf", "a\n", "x" * 129])
def test_no_file_name_leads_out(name: str) -> None:
    assert not is_file_name(name)


# --- manifest ---


def test_manifest_round_trip() -> None:
    whole = manifest(7)
    assert Manifest.from_bytes(whole.to_bytes()) == whole


@given(st.data())
def test_no_byte_of_a_manifest_changes_unseen(data: st.DataObject) -> None:
    whole = manifest(7).to_bytes()
    index = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != whole[index]))
    changed = whole[:index] + bytes([other]) + whole[index + 1 :]
    with contextlib.suppress(DamagedCheckpoint):
        assert Manifest.from_bytes(changed) == manifest(7), "only white space may change unseen"


@given(st.integers(0, 400))
def test_no_part_of_a_manifest_passes(length: int) -> None:
    whole = manifest(7).to_bytes().rstrip()
    with pytest.raises(DamagedCheckpoint):
        Manifest.from_bytes(whole[: min(length, len(whole) - 1)])


def test_meta_is_what_json_gives_back() -> None:
    assert check_meta({"a": (1, 2), "b": {"c": None}}) == {"a": [1, 2], "b": {"c": None}}
    with pytest.raises(ValueError, match="Out of range"):
        check_meta({"loss": float("inf")})


# --- commit ---


def test_commit_counts_and_verifies(uri: str) -> None:
    store = CheckpointStore(uri)
    fence, abandoned = store.claim(1)
    assert abandoned == []
    assert steps(store) == []
    assert write(store, 5, fence)
    assert steps(CheckpointStore(uri)) == [5]
    [candidate] = store.candidates()
    assert store.verify(candidate) == []
    assert store.manifest(candidate).meta == {"step": 5}


def test_a_committed_step_is_never_replaced(uri: str) -> None:
    store = CheckpointStore(uri)
    first, _ = store.claim(1)
    assert write(store, 5, first, size=100)
    second, _ = store.claim(2)
    assert not write(store, 5, second, size=200)
    assert store.manifest(store.candidates()[0]).attempt == 1


def test_a_step_committed_by_another_between_begin_and_commit_is_kept(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    fence, _ = store.claim(1)
    _, working = store.begin(5, fence)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005/MANIFEST.json").write_bytes(manifest(5, 9).to_bytes())
    with store.files.create(working, ".metadata") as stream:
        stream.write(b"x")
    kept, new = store.commit(working, manifest(5), fence)
    assert not new
    assert store.manifest(kept).attempt == 9
    assert [d.name for d in tmp_path.iterdir() if d.is_dir()] == ["step-00000005"]


def test_one_known_to_be_bad_is_moved_out_of_the_way(uri: str) -> None:
    store = CheckpointStore(uri)
    fence, _ = store.claim(1)
    write(store, 5, fence)
    later, _ = store.claim(2)
    assert write(store, 5, later, size=50, bad=(5,))
    assert [store.manifest(c).attempt for c in store.candidates()] == [2]
    assert len(store.files.bad()) == 1
    # The same attempt again: in an object store both have one name.
    assert write(store, 5, later, size=60, bad=(5,))
    assert store.manifest(store.candidates()[0]).files[0].size == 60
    assert store.verify(store.candidates()[0]) == []


def test_missing_or_short_files_do_not_commit(uri: str) -> None:
    store = CheckpointStore(uri)
    fence, _ = store.claim(1)
    _, working = store.begin(5, fence)
    with pytest.raises(SaveFailed, match=r"\.metadata: written by a rank, not seen by rank 0; do all nodes share it\?"):
        store.commit(working, manifest(5), fence)
    with store.files.create(working, ".metadata") as stream:
        stream.write(b"twelve bytes")
    with pytest.raises(SaveFailed, match="12 bytes here, 1 were written"):
        store.commit(working, manifest(5), fence)
    assert steps(store) == []


# --- the fence ---


def test_only_the_newest_attempt_commits(uri: str) -> None:
    store = CheckpointStore(uri)
    old, _ = store.claim(1)
    _, working = store.begin(5, old)
    with store.files.create(working, ".metadata") as stream:
        stream.write(b"x")
    new, abandoned = store.claim(2)
    assert [path.split("/")[-1].split(".tmp")[0] for path in abandoned] == ["step-00000005.attempt-1"]
    with pytest.raises(StaleAttempt, match="attempt 1 is stale, attempt 2 has taken over"):
        store.begin(6, old)
    store.files.make(working)
    with store.files.create(working, ".metadata") as stream:
        stream.write(b"x")
    with pytest.raises(StaleAttempt):
        store.commit(working, manifest(5), old)
    with pytest.raises(StaleAttempt):
        store.claim(1)
    assert steps(store) == []
    assert write(store, 5, new)


def test_a_zombie_that_froze_after_the_fence_was_checked_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: the lock is no help (none there, or its holder frozen), and the next attempt has begun."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    zombie, successor = CheckpointStore(str(tmp_path)), CheckpointStore(str(tmp_path))
    old, _ = zombie.claim(1)
    _, working = zombie.begin(5, old)
    with zombie.files.create(working, ".metadata") as stream:
        stream.write(b"x")

    def awake(stage: str) -> None:
        if stage == "fenced":
            successor.claim(2)

    with pytest.raises(OSError):
        zombie.commit(working, manifest(5), old, on_stage=awake)
    assert steps(successor) == []


def test_in_an_object_store_a_stale_marker_is_taken_back() -> None:
    """No rename that could fail there: the marker is written, and the fence read once more after it."""
    uri = f"memory://zombie-{os.getpid()}"
    zombie, successor = CheckpointStore(uri), CheckpointStore(uri)
    old, _ = zombie.claim(1)
    _, working = zombie.begin(5, old)
    with zombie.files.create(working, ".metadata") as stream:
        stream.write(b"x")
    seen: list[list[int]] = []

    def awake(stage: str) -> None:
        if stage == "fenced":
            successor.claim(2)
        if stage == "renamed":
            seen.append(steps(successor))

    with pytest.raises(StaleAttempt):
        zombie.commit(working, manifest(5), old, on_stage=awake)
    assert seen == [[5]], "the marker was there: the test hits the moment it means"
    assert steps(successor) == []


def test_owners_take_over_and_generations_count(uri: str) -> None:
    store = CheckpointStore(uri)
    first, _ = store.claim(9, "a")
    second, _ = store.claim(1, "b")
    third, _ = store.claim(1, "a")
    assert [first.generation, second.generation, third.generation] == [1, 2, 3]
    for stale in (first, second):
        with pytest.raises(StaleAttempt):
            store.begin(1, stale)
    store.begin(1, third)


def test_a_vanished_or_broken_fence_stops_commits(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    fence, _ = store.claim(1)
    (tmp_path / "fence.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a fence"):
        store.begin(1, fence)
    (tmp_path / "fence.json").unlink()
    with pytest.raises(CheckpointError, match=r"gone; was the checkpoint root emptied"):
        store.begin(1, fence)


def test_the_lock_is_waited_for_freed_by_death_and_not_waited_for_for_ever(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    )
    held = subprocess.Popen([sys.executable, "-c", holder, path], stdout=subprocess.PIPE)
    assert held.stdout is not None
    held.stdout.readline()
    start = time.monotonic()
    with exclusive(path, patience=0.3):
        assert 0.25 < time.monotonic() - start < 5, "a frozen holder does not stop the next attempt"
    held.kill()
    held.wait()
    with exclusive(path), open(path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_filesystem_without_locks_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    store = CheckpointStore(str(tmp_path))
    assert write(store, 1, store.claim(1)[0])


# --- retention ---


def test_retention_keeps_the_newest_committed(uri: str) -> None:
    store = CheckpointStore(uri)
    fence, _ = store.claim(1)
    for step in (10, 20, 30, 40):
        write(store, step, fence)
    assert [gone.step for gone in store.retain(2, fence)] == [20, 10]
    assert steps(store) == [40, 30]
    assert store.files.leftovers() == []


def test_damaged_ones_do_not_count_and_are_not_taken(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    fence, _ = store.claim(1)
    for step in (10, 20, 30):
        write(store, step, fence)
    (tmp_path / "step-00000030/MANIFEST.json").write_text("{")
    assert store.retain(2, fence) == []
    assert store.retain(1, fence, bad=(20,)) == []
    assert steps(store) == [30, 20, 10]


def test_a_deletion_cut_short_is_never_seen_as_committed(tmp_path: Path) -> None:
    class Dies(PosixFiles):
        def remove(self, directory: str) -> None:
            os.unlink(Path(self.root, directory, "__0_0.distcp"))
            raise KeyboardInterrupt

    store = CheckpointStore(str(tmp_path))
    fence, _ = store.claim(1)
    for step in (10, 20):
        write(store, step, fence)
    with pytest.raises(KeyboardInterrupt):
        CheckpointStore(str(tmp_path), files=Dies(str(tmp_path))).retain(1, fence)
    assert steps(store) == [20]
    assert store.claim(2)[1] == [], "a deletion is not a save that was cut short"
    assert sorted(d.name for d in tmp_path.iterdir() if d.is_dir()) == ["step-00000020"]


def test_damage_kept_for_a_look_is_bounded(uri: str) -> None:
    store = CheckpointStore(uri)
    fence, _ = store.claim(1)
    for step in (10, 20, 30):
        write(store, step, fence)
        store.set_aside(store.candidates()[0], fence, "test")
    write(store, 40, fence)
    store.retain(3, fence)
    assert len(store.files.bad()) == 1
    assert "00000030" in store.files.bad()[0]


def test_foreign_directories_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    store = CheckpointStore(str(tmp_path))
    fence, _ = store.claim(1)
    for step in (1, 2, 3):
        write(store, step, fence)
    store.retain(1, fence)
    assert {"logs", "step-1", "notes.txt"} <= {path.name for path in tmp_path.iterdir()}


# --- verification ---


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.integers(1, 9))
def test_every_file_is_verified_once_and_the_load_is_even(sizes: list[int], world: int) -> None:
    entries = [FileEntry(f"f{i}", size, "") for i, size in enumerate(sizes)]
    shares = [share(entries, rank, world) for rank in range(world)]
    assert sorted(entry.name for part in shares for entry in part) == sorted(entry.name for entry in entries)
    loads = [sum(entry.size for entry in part) for part in shares]
    assert max(loads) - min(loads) <= max(sizes) + len(sizes)


def test_object_store_manifest_must_be_the_committed_one(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}"
    store = CheckpointStore(uri)
    write(store, 5, store.claim(1)[0])
    [candidate] = store.candidates()
    store.files.replace(candidate.directory, "MANIFEST.json", manifest(5, 3).to_bytes())
    [problem] = store.verify(candidate)
    assert problem.reason == "manifest is not the one that was committed"
    store.files.replace(candidate.directory, "COMMITTED.json", b"torn")
    assert store.verify(candidate)[0].damaged


def test_an_unknown_url_says_what_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.uri: nosuch://x"):
        CheckpointStore("nosuch://x")


def test_fence_is_plain_json(tmp_path: Path) -> None:
    CheckpointStore(str(tmp_path)).claim(3, "uid")
    assert json.loads((tmp_path / "fence.json").read_text()) == {"attempt": 3, "owner": "uid", "generation": 1}
