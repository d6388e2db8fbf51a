"""Interrupted any number of times, on any number of ranks, training goes on exactly where it was."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe
from reference import largest_difference, saved_weights
from trireme_api.protocol import Cause, ExitCode
from trireme_api.recipe import Recipe
from trireme_trainer.data.mixture import Mixture

TOKENS = SEQUENCE * SEQUENCES
LONG = 40
SCHEDULE = {"warmupTokens": 4 * TOKENS, "decayTokens": LONG * TOKENS}
"""The same for any `until`, so that a run cut short is the beginning of a longer one."""


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    recipe = make_recipe(corpus, steps=LONG, schedule=SCHEDULE)
    return Gang(tmp_path_factory.mktemp("uninterrupted"), recipe, world=1, every=1000).run()


def recipe(corpus: Path, steps: int) -> dict:
    return make_recipe(corpus, steps=steps, schedule=SCHEDULE)


def test_elastic_resume_4_2_3_1(corpus: Path, tmp_path: Path, uninterrupted: Gang) -> None:
    mixture = Mixture.from_recipe(Recipe.model_validate(recipe(corpus, LONG)))
    epoch = {step: mixture.locate(step * SEQUENCES)[1] for step in (9, 13, 15)}
    assert epoch == {9: 0, 13: 0, 15: 1}, "the third run must cross the end of the epoch"
    worlds = [(4, 6), (2, 9), (3, 16), (1, 20)]
    losses: dict[int, float] = {}
    for attempt, (world, steps) in enumerate(worlds, start=1):
        gang = Gang(tmp_path, recipe(corpus, steps), world=world, attempt=attempt, every=1000).run()
        assert min(gang.losses()) == len(losses) + 1
        losses.update(gang.losses())
    assert sorted(losses) == list(range(1, 21))
    assert largest_difference(losses, uninterrupted.losses()) <= 1e-5


@pytest.mark.parametrize(
    "parallelism", [{"shard": "grad-op"}, {"shard": "hybrid", "shardSize": 2}], ids=["grad-op", "hybrid"]
)
def test_resume_under_another_sharding(corpus: Path, tmp_path: Path, uninterrupted: Gang, parallelism: dict) -> None:
    Gang(tmp_path, recipe(corpus, 4), world=3).run()
    gang = Gang(tmp_path, {**recipe(corpus, 8), "parallelism": parallelism}, world=4, attempt=2).run()
    assert sorted(gang.losses()) == [5, 6, 7, 8]
    assert largest_difference(gang.losses(), uninterrupted.losses()) <= 1e-5


@pytest.mark.parametrize("how", ["signal to one rank", "stop file"])
def test_stop_is_agreed_saved_and_resumed(corpus: Path, tmp_path: Path, uninterrupted: Gang, how: str) -> None:
    gang = Gang(tmp_path, recipe(corpus, LONG), world=2, every=1000).start().until_step(3)
    if how == "stop file":
        (gang.work / "stop").touch()
    else:
        gang.signal(signal.SIGTERM, [1])
    assert gang.wait() == [ExitCode.SAVED_AND_STOPPED] * 2, gang.logs()
    stopped = max(gang.losses())
    assert 3 <= stopped < LONG
    assert saved_weights(gang.checkpoints, gang.recipe)[0] == stopped
    beat = gang.heartbeat(1)
    assert beat is not None
    assert beat.failure is None
    assert beat.checkpoint is not None
    assert (beat.phase, beat.step, beat.checkpoint.step) == ("done", stopped, stopped)
    (tmp_path / "attempt-1" / "stop").unlink(missing_ok=True)
    # saved_weights fenced the directory off as another owner; the next attempt takes it back.
    again = Gang(tmp_path, recipe(corpus, stopped + 4), world=3, attempt=2).run()
    assert sorted(again.losses()) == list(range(stopped + 1, stopped + 5))
    assert largest_difference({**gang.losses(), **again.losses()}, uninterrupted.losses()) <= 1e-5


def test_stop_without_checkpoints_does_not_claim_to_have_saved(corpus: Path, tmp_path: Path) -> None:
    gang = Gang(tmp_path, recipe(corpus, 100_000), world=1, checkpoint=False).start().until_step(2)
    gang.signal(signal.SIGTERM)
    assert gang.wait() == [128 + signal.SIGTERM], gang.logs()
    beat = gang.heartbeat()
    assert beat is not None
    assert beat.failure is not None
    assert "no checkpoint is configured" in beat.failure.message


def test_a_killed_rank_ends_the_others_and_the_restart_is_exact(
    corpus: Path, tmp_path: Path, uninterrupted: Gang
) -> None:
    gang = Gang(tmp_path, recipe(corpus, 100_000), world=3, every=3)
    gang.start().until(lambda beat: beat.checkpoint is not None and beat.step >= beat.checkpoint.step + 2, "lost work")
    killed = time.monotonic()
    gang.signal(signal.SIGKILL, [1])
    codes = gang.wait(30)
    seconds = time.monotonic() - killed
    assert codes == [1, -signal.SIGKILL, 1], gang.logs()
    assert seconds < 10, f"peers took {seconds:.1f} s to notice"
    for rank in (0, 2):
        beat = gang.heartbeat(rank)
        assert beat is not None
        assert beat.failure is not None
        assert (beat.failure.cause, beat.failure.rank) == (Cause.NETWORK, rank)
        assert beat.failure.message.startswith("lost a peer")
    lost = max(gang.losses())
    again = Gang(tmp_path, recipe(corpus, min(lost + 3, LONG)), world=3, attempt=2, every=3).run()
    first = min(again.losses())
    assert first <= lost, "steps after the last checkpoint are done again"
    assert again.events("resumed")[0]["step"] == first - 1
    both = {step: loss for step, loss in {**gang.losses(), **again.losses()}.items() if step <= LONG}
    assert largest_difference(both, uninterrupted.losses()) <= 1e-5
    # The log keeps both attempts' rows of the steps that were done twice, and tells them apart.
    twice = [row["attempt"] for row in again.rows() if row.get("step") == first and "loss" in row]
    assert twice == [1, 2]


def test_a_silent_rank_is_given_up_on_after_the_step_timeout(corpus: Path, tmp_path: Path) -> None:
    gang = Gang(tmp_path, recipe(corpus, 100_000), world=2, environment={"TRIREME_STEP_TIMEOUT": "3"})
    gang.start().until_step(5)
    gang.signal(signal.SIGSTOP, [1])
    stopped = time.monotonic()
    gang.ranks[0].join(30)
    seconds = time.monotonic() - stopped
    gang.signal(signal.SIGKILL, [1])
    gang.wait(10)
    assert gang.codes[0] == 1, gang.logs()
    assert 2 < seconds < 15, seconds
    beat = gang.heartbeat()
    assert beat is not None
    assert beat.failure is not None
    assert beat.failure.cause == Cause.NETWORK


@pytest.mark.parametrize("damage", ["truncated", "two bytes flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    corpus: Path, tmp_path: Path, uninterrupted: Gang, damage: str
) -> None:
    gang = Gang(tmp_path, recipe(corpus, 6), world=2, every=2).run()
    newest = max(gang.checkpoints.glob("step-*"))
    shard = max((path for path in newest.iterdir() if path.suffix == ".distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0x40
        data[len(data) // 2 + 1] ^= 0x01
    shard.write_bytes(data)
    again = Gang(tmp_path, recipe(corpus, 8), world=2, attempt=2, every=2).run()
    skipped = again.events("checkpoint-skipped")
    assert [row["path"] for row in skipped] == [str(newest)]
    assert shard.name in skipped[0]["reason"]
    assert ("truncated" if damage == "truncated" else "content changed") in skipped[0]["reason"]
    assert str(shard) in again.logs(), "the log names the file as well"
    assert again.events("resumed")[0]["step"] == 4
    assert sorted(again.losses()) == [5, 6, 7, 8]
    assert largest_difference(again.losses(), uninterrupted.losses()) <= 1e-5


def test_a_finished_run_stays_finished(corpus: Path, tmp_path: Path) -> None:
    Gang(tmp_path, recipe(corpus, 3), world=1).run()
    again = Gang(tmp_path, recipe(corpus, 3), world=2, attempt=2).run()
    assert again.losses() == {}
    assert again.events("resumed")[0]["step"] == 3
