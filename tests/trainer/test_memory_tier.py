"""Shards kept in memory: what survives the end of a process, of a pod, of two pods, and what a torn copy does.

Pods are folders here: what a killed process leaves in its folder is what the kernel would keep of a pod's tmpfs, and a
pod that is lost is a folder that is removed.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe
from reference import largest_difference
from trireme_api.shards import Shard, by_set, newest_whole, parse_shard

TOKENS = SEQUENCE * SEQUENCES
LONG = 60
SCHEDULE = {"warmupTokens": 4 * TOKENS, "decayTokens": LONG * TOKENS}
EVERY = 2
MEMORY = {"everySteps": EVERY, "replicas": 1}


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    recipe = make_recipe(corpus, steps=LONG, schedule=SCHEDULE)
    return Gang(tmp_path_factory.mktemp("uninterrupted"), recipe, world=1, every=1000).run()


def recipe(corpus: Path, steps: int) -> dict:
    return make_recipe(corpus, steps=steps, schedule=SCHEDULE)


def killed(corpus: Path, root: Path, *, world: int = 3, every: int = 5, fault: str = "", after: int = 8) -> Gang:
    """Three pods of one rank each; rank 1 gets SIGKILL once step `after` is done, and the others end with it."""
    gang = Gang(root, recipe(corpus, 100_000), world=world, per_node=1, every=every, memory=MEMORY, fault=fault)
    gang.start().until_step(after)
    gang.signal(signal.SIGKILL, [1])
    codes = gang.wait(30)
    assert codes == [1, -signal.SIGKILL, 1][:world], gang.logs()
    return gang


def resume(gang: Gang, corpus: Path, *, steps: int = 4, **changes: object) -> Gang:
    """The next attempt, a few steps beyond where it resumes. `changes` replace fields of the gang."""
    fields = {"world": gang.world, "per_node": gang.per_node, "every": 1000, "memory": MEMORY, **changes}
    done = max(gang.losses())
    until = min(done + steps, LONG)
    return Gang(gang.root, recipe(corpus, until), attempt=gang.attempt + 1, **fields).run()  # type: ignore[arg-type]


def whole(gang: Gang, pods: list[int] | None = None) -> int | None:
    """Step of the newest set that the pods together hold, read from the names in their folders."""
    held = [
        shard
        for node in (range(gang.node(gang.world - 1) + 1) if pods is None else pods)
        for shard in shards(gang, node)
    ]
    best = newest_whole(by_set(held), gang.world)
    return best.step if best else None


def shards(gang: Gang, node: int) -> list[Shard]:
    found = [parse_shard(path.name) for path in gang.pod_memory(node).glob("step-*")]
    return sorted(shard for shard in found if shard is not None)


def lose(gang: Gang, node: int) -> None:
    shutil.rmtree(gang.pod_memory(node))


def resumed(gang: Gang) -> dict:
    (row,) = gang.events("resumed")
    return row


def storage_reads(gang: Gang) -> list[str]:
    """Files of checkpoints in storage that any rank of this attempt opened (fault `watch_storage`)."""
    return [line for path in gang.work.glob("storage-reads-*") for line in path.read_text().splitlines()]


def exact(gangs: list[Gang], uninterrupted: Gang) -> None:
    losses = {}
    for gang in gangs:
        losses.update(gang.losses())
    assert sorted(losses) == list(range(1, max(losses) + 1)), "no step is left out"
    kept = {step: loss for step, loss in losses.items() if step <= LONG}
    assert largest_difference(kept, uninterrupted.losses()) <= 1e-5


def test_a_killed_process_resumes_from_memory_without_reading_storage(
    corpus: Path, tmp_path: Path, uninterrupted: Gang
) -> None:
    gang = killed(corpus, tmp_path, every=3)
    assert list(gang.checkpoints.glob("step-*")), "storage has checkpoints that could have been read"
    newest = whole(gang)
    assert newest is not None
    again = resume(gang, corpus, fault="watch_storage")
    row = resumed(again)
    assert (row["tier"], row["step"], row["fromPeers"]) == ("memory", newest, 0), again.logs()
    assert newest >= max(gang.losses()) - 2 * EVERY
    assert storage_reads(again) == []
    exact([gang, again], uninterrupted)


def test_the_watch_sees_storage_being_read(corpus: Path, tmp_path: Path) -> None:
    Gang(tmp_path, recipe(corpus, 3), world=2, every=3).run()
    again = Gang(tmp_path, recipe(corpus, 4), world=2, attempt=2, fault="watch_storage").run()
    assert any("MANIFEST.json" in line for line in storage_reads(again))
    assert any(".distcp" in line for line in storage_reads(again))


def test_a_lost_pod_resumes_from_its_peers_copy(corpus: Path, tmp_path: Path, uninterrupted: Gang) -> None:
    gang = killed(corpus, tmp_path, every=1000)
    lose(gang, 1)
    newest = whole(gang)
    assert newest is not None
    again = resume(gang, corpus, fault="watch_storage")
    row = resumed(again)
    assert (row["tier"], row["step"], row["fromPeers"]) == ("memory", newest, 1), again.logs()
    assert storage_reads(again) == []
    exact([gang, again], uninterrupted)
    # The attempt after it finds its own shards everywhere again, and the copies that pod 1 kept for pod 0.
    assert {shard.rank for shard in shards(again, 1)} == {0, 1}


def test_a_pod_and_its_peer_gone_goes_to_storage_and_says_why(
    corpus: Path, tmp_path: Path, uninterrupted: Gang
) -> None:
    gang = killed(corpus, tmp_path, every=3)
    lose(gang, 1)
    lose(gang, 2)
    again = resume(gang, corpus)
    row = resumed(again)
    assert row["tier"] == "storage"
    assert row["step"] == max(gang.events("checkpoint"), key=lambda e: e["step"])["step"]
    skipped = [e for e in again.events("checkpoint-skipped") if e.get("tier") == "memory"]
    assert skipped, again.logs()
    assert "are gone with their pods" in skipped[0]["reason"]
    exact([gang, again], uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_torn_copy_is_found_and_the_other_copy_used(
    corpus: Path, tmp_path: Path, uninterrupted: Gang, damage: str
) -> None:
    gang = killed(corpus, tmp_path, every=1000)
    newest = whole(gang)
    assert newest is not None
    tear(gang, 0, newest, 0, damage)
    again = resume(gang, corpus)
    row = resumed(again)
    assert (row["tier"], row["step"], row["fromPeers"]) == ("memory", newest, 1), again.logs()
    (skipped,) = again.events("checkpoint-skipped")
    assert ("torn" if damage == "truncated" else "content changed") in skipped["reason"]
    exact([gang, again], uninterrupted)


def test_both_copies_torn_goes_to_storage(corpus: Path, tmp_path: Path, uninterrupted: Gang) -> None:
    gang = killed(corpus, tmp_path, every=3)
    for step in {shard.step for shard in shards(gang, 0) if shard.rank == 0}:
        tear(gang, 0, step, 0, "changed")
        tear(gang, 1, step, 0, "changed")
    again = resume(gang, corpus)
    assert resumed(again)["tier"] == "storage", again.logs()
    assert len(again.events("checkpoint-skipped")) >= 2
    exact([gang, again], uninterrupted)


def test_newer_storage_wins_and_memory_stands_in_when_it_is_damaged(
    corpus: Path, tmp_path: Path, uninterrupted: Gang
) -> None:
    """Ended on request at step 7: the last save is in storage, memory is at 6."""
    gang = Gang(tmp_path, recipe(corpus, 7), world=2, per_node=1, every=1000, memory=MEMORY).run()
    assert whole(gang) == 6
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "memory", copy)
    again = Gang(tmp_path, recipe(corpus, 9), world=2, per_node=1, attempt=2, every=1000, memory=MEMORY).run()
    assert (resumed(again)["tier"], resumed(again)["step"]) == ("storage", 7)
    assert whole(again) == 8, "what was not resumed from is gone"
    # Attempt 3 meets storage damaged at both steps, and memory as it was after attempt 1.
    for path in again.checkpoints.glob("step-*/*.distcp"):
        path.write_bytes(path.read_bytes()[:-40])
    shutil.rmtree(tmp_path / "memory")
    shutil.copytree(copy, tmp_path / "memory")
    third = Gang(tmp_path, recipe(corpus, 10), world=2, per_node=1, attempt=3, every=2, memory=MEMORY).run()
    assert (resumed(third)["tier"], resumed(third)["step"]) == ("memory", 6), third.logs()
    assert any("truncated" in row["reason"] for row in third.events("checkpoint-skipped"))
    assert {row["step"] for row in third.events("checkpoint")} >= {8, 10}, "the damaged steps are saved again"
    assert largest_difference(third.losses(), uninterrupted.losses()) <= 1e-5


def test_another_world_size_uses_storage_and_says_so(corpus: Path, tmp_path: Path, uninterrupted: Gang) -> None:
    gang = killed(corpus, tmp_path, every=3)
    again = resume(gang, corpus, world=2)
    assert resumed(again)["tier"] == "storage", again.logs()
    reasons = [row["reason"] for row in again.events("checkpoint-skipped")]
    assert any("written by 3 ranks, this attempt has 2" in reason for reason in reasons), reasons
    exact([gang, again], uninterrupted)


def test_another_sharding_uses_storage_and_says_so(corpus: Path, tmp_path: Path) -> None:
    first = Gang(tmp_path, recipe(corpus, 6), world=2, per_node=1, every=3, memory=MEMORY).run()
    shutil.rmtree(first.checkpoints / "step-00000006")
    hybrid = {**recipe(corpus, 8), "parallelism": {"shard": "hybrid", "shardSize": 1}}
    again = Gang(tmp_path, hybrid, world=2, per_node=1, attempt=2, every=1000, memory=MEMORY).run()
    assert (resumed(again)["tier"], resumed(again)["step"]) == ("storage", 3), again.logs()
    assert any("another model or sharding" in row["reason"] for row in again.events("checkpoint-skipped"))


@pytest.mark.parametrize("stage", ["staged", "published", "sending", "received", "copied", "complete"])
def test_killed_at_any_stage_of_a_save_resumes_from_a_whole_set(
    corpus: Path, tmp_path: Path, uninterrupted: Gang, stage: str
) -> None:
    """Rank 1 ends with SIGKILL at that stage of the third set, and its pod is lost with it."""
    gang = Gang(
        tmp_path, recipe(corpus, 100_000), world=3, per_node=1, every=1000, memory=MEMORY,
        fault="die_in_memory_save", environment={"DIE_AT": stage},
    )  # fmt: skip
    codes = gang.start().wait(60)
    assert codes == [1, -signal.SIGKILL, 1], gang.logs()
    lose(gang, 1)
    newest = whole(gang)
    assert newest in ({6} if stage in ("copied", "complete") else {4, 6})
    again = resume(gang, corpus)
    assert (resumed(again)["tier"], resumed(again)["step"]) == ("memory", newest), again.logs()
    exact([gang, again], uninterrupted)
    names = [path.name for node in range(3) for path in again.pod_memory(node).iterdir()]
    assert not [name for name in names if name.startswith("working-")], "nothing half done is left"


def test_two_ranks_in_each_pod(corpus: Path, tmp_path: Path, uninterrupted: Gang) -> None:
    gang = Gang(tmp_path, recipe(corpus, 100_000), world=4, per_node=2, every=1000, memory=MEMORY)
    gang.start().until_step(6)
    gang.signal(signal.SIGKILL, [0, 1])
    gang.wait(30)
    lose(gang, 0)
    newest = whole(gang)
    assert newest is not None
    again = resume(gang, corpus)
    assert (resumed(again)["tier"], resumed(again)["step"], resumed(again)["fromPeers"]) == ("memory", newest, 2)
    exact([gang, again], uninterrupted)


def test_a_stale_attempt_publishes_nothing(tmp_path: Path) -> None:
    import torch
    from trireme_trainer.checkpoint import MemoryFolder, StaleAttempt

    old, new = (MemoryFolder(str(tmp_path), attempt=attempt, owner="job") for attempt in (1, 2))
    old.claim()
    draft, layout = old.stage("0-own", {"a": torch.arange(5.0)})
    shard = Shard(step=3, attempt=1, world=1, rank=0)
    old.seal(draft, shard, layout, {})
    new.claim()
    with pytest.raises(StaleAttempt):
        old.publish(draft, shard)
    assert new.shards() == []
    with pytest.raises(StaleAttempt):
        old.claim()


def test_a_full_memory_is_reported_and_training_goes_on(corpus: Path, tmp_path: Path, uninterrupted: Gang) -> None:
    gang = Gang(
        tmp_path, recipe(corpus, 8), world=2, per_node=1, every=4, memory=MEMORY, fault="memory_is_full_on_rank_1"
    ).run()
    failed = [row for row in gang.events("checkpoint-failed") if row.get("tier") == "memory"]
    assert failed
    assert "No space left" in failed[0]["reason"]
    assert "rank 1" in failed[0]["reason"]
    assert {row["step"] for row in gang.events("checkpoint")} == {4, 8}
    assert whole(gang) is None
    assert largest_difference(gang.losses(), uninterrupted.losses()) <= 1e-5


def test_without_a_folder_the_tier_is_off_and_says_so(corpus: Path, tmp_path: Path) -> None:
    gang = Gang(tmp_path, recipe(corpus, 3), world=2, memory=MEMORY, environment={"TRIREME_MEMORY_DIR": ""}).run()
    (off,) = gang.events("memory-tier-off")
    assert "TRIREME_MEMORY_DIR" in off["reason"]


def test_auto_interval_saves_once_then_by_the_formula(corpus: Path, tmp_path: Path) -> None:
    """One failure a second so far: saves cost about as much as that, and come often."""
    told = json.dumps({"count": 10**9, "seconds": 0.0})
    gang = Gang(tmp_path, recipe(corpus, 40), world=2, every="auto", environment={"TRIREME_FAILURES": told}).run()
    saved = sorted(row["step"] for row in gang.events("checkpoint"))
    assert saved[0] == 8
    assert len(saved) > 2, gang.logs()
    rows = gang.events("checkpoint-interval")
    assert rows
    assert rows[0]["mtbfSeconds"] < 1
    assert "Young" in gang.logs()


def tear(gang: Gang, node: int, step: int, rank: int, damage: str) -> None:
    (path,) = gang.pod_memory(node).glob(f"step-{step:08d}.*.rank-{rank:05d}-of-*.shard")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
