"""Loss spikes: told, skipped, or undone by going back; and fp16 with its loss scaler, sharded and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe
from reference import Training, largest_difference, saved_weights, train
from trireme_api.protocol import Cause, ExitCode
from trireme_api.recipe import StabilitySpec
from trireme_trainer.checkpoint import CheckpointStore

TOKENS = SEQUENCE * SEQUENCES
SPIKE = {"spikeRatio": 1.03, "spikeSpan": 4, "skipWindow": 3, "lrFactor": 0.5, "budget": 2}


def recipe(corpus: Path, policy: str, steps: int = 16, **stability: Any) -> dict[str, Any]:
    """Decays over 40 steps whatever `steps`, so that a run cut short is the beginning of a longer one."""
    return make_recipe(
        corpus, steps=steps, schedule={"warmupTokens": 4 * TOKENS, "decayTokens": 40 * TOKENS},
        stability={**SPIKE, "onSpike": policy, **stability},
    )  # fmt: skip


def undisturbed_but_for(window: range, recipe: dict[str, Any], steps: int, since: int) -> Training:
    """One process, batches in `window` never seen, half the learning rate for steps after `since`."""
    order = [batch for batch in range(steps + len(window)) if batch not in window]
    return train(recipe, steps, batches=lambda s: order[s - 1], factor=lambda s: 0.5 if s > since else 1.0)


@pytest.mark.parametrize("world", [1, 2])
def test_log_trains_on_and_tells(corpus: Path, tmp_path: Path, world: int) -> None:
    gang = Gang(tmp_path, recipe(corpus, "log"), world=world, fault="noise_in_batch_9").run()
    assert {step for step, spike in gang.column("spike").items() if spike} == {10}
    assert not any(gang.column("skipped").values())
    assert "step 10: loss" in gang.logs()
    assert "× the mean of recent steps" in gang.logs()
    beat = gang.heartbeat(world - 1)
    assert beat is not None
    assert beat.progress is not None
    assert (beat.progress.spikes, beat.progress.skipped_steps, beat.progress.rollbacks) == (1, 0, 0)


@pytest.mark.parametrize("world", [1, 2])
def test_skip_leaves_the_weights_alone(corpus: Path, tmp_path: Path, world: int) -> None:
    spec = recipe(corpus, "skip")
    gang = Gang(tmp_path, spec, world=world, fault="noise_in_batch_9").run()
    assert {step for step, skipped in gang.column("skipped").items() if skipped} == {10}
    reference = train(spec, 16, skip={10}).losses
    ours = gang.losses()
    assert ours[10] > 1.03 * reference[9]
    assert largest_difference({s: v for s, v in ours.items() if s != 10}, reference) <= 1e-5


@pytest.mark.parametrize("world", [1, 2])
def test_rollback_is_the_run_that_never_saw_the_window(corpus: Path, tmp_path: Path, world: int) -> None:
    """Spike at step 10, newest checkpoint at 8: batches 8, 9, 10 are left out, and from step 9 on half the rate."""
    spec = recipe(corpus, "rollback")
    gang = Gang(tmp_path, spec, world=world, every=4, fault="noise_in_batch_9").run()
    (event,) = gang.events("rolled-back")
    assert (event["step"], event["spikeStep"], event["lostSteps"], event["leftOut"]) == (8, 10, 2, [8, 11])
    assert (event["learningRateFactor"], event["rollbacks"]) == (0.5, 1)
    assert event["path"].endswith("step-00000008")
    steps = [row["step"] for row in gang.rows() if "loss" in row]
    assert steps == [*range(1, 11), *range(9, 17)], "in place: the same attempt goes on"
    reference = undisturbed_but_for(range(8, 11), spec, 16, since=8)
    assert largest_difference(gang.losses(), reference.losses) <= 1e-5
    _, weights = saved_weights(gang.checkpoints, spec)
    assert max(float((weights[n] - w).abs().max()) for n, w in reference.weights.items()) < 1e-3
    beat = gang.heartbeat(world - 1)
    assert beat is not None
    assert beat.progress is not None
    assert (beat.progress.rollbacks, beat.progress.spikes) == (1, 1)
    assert "rolled back to step 8" in gang.logs()


def test_a_checkpoint_saved_before_the_host_knew_is_set_aside(corpus: Path, tmp_path: Path) -> None:
    """The spike's own step 10 is saved while its numbers are still on the device; training goes back to 5, and saves
    another step 10 later, which is the one that counts."""
    spec = recipe(corpus, "rollback", steps=13)
    gang = Gang(tmp_path, spec, world=2, every=5, fault="noise_in_batch_9_told_a_step_late").run()
    (event,) = gang.events("rolled-back")
    assert (event["step"], event["spikeStep"], event["leftOut"]) == (5, 10, [7, 10])
    assert [row["step"] for row in gang.events("checkpoint")] == [5, 10, 10, 13]
    assert (gang.checkpoints / "step-00000010.attempt-1.bad").is_dir()
    reference = undisturbed_but_for(range(7, 10), spec, 13, since=5)
    assert largest_difference(gang.losses(), reference.losses) <= 1e-5
    (gang.checkpoints / "step-00000013").rename(tmp_path / "gone")
    saved = CheckpointStore(str(gang.checkpoints))
    history = saved.manifest(saved.candidates()[0]).meta["stability"]["history"]
    assert (saved.candidates()[0].step, history["leftOut"]) == (10, [[7, 10]])


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_resume_after_a_rollback_goes_on_identically(corpus: Path, tmp_path: Path, first: int, then: int) -> None:
    """Stopped after the rollback, resumed at another size, where a second spike is judged, undone and counted."""
    fault = "noise_in_batches_9_and_13"
    Gang(tmp_path / "a", recipe(corpus, "rollback", steps=10), world=first, every=4, fault=fault).run()
    again = Gang(
        tmp_path / "a", recipe(corpus, "rollback", steps=18), world=then, every=4, fault=fault, attempt=2
    ).run()  # fmt: skip
    whole = Gang(tmp_path / "b", recipe(corpus, "rollback", steps=18), world=first, every=4, fault=fault).run()
    assert [event["rollbacks"] for event in whole.events("rolled-back")] == [1, 2]
    (resumed,) = again.events("rolled-back")
    second = whole.events("rolled-back")[1]
    assert {resumed["spikeStep"], second["spikeStep"]} == {11}, "batch 13, three being left out"
    # Stopped at step 10 it has a checkpoint that the other has not: less is done again, the window begins later.
    assert (resumed["step"], resumed["leftOut"]) == (10, [13, 16])
    assert (second["step"], second["leftOut"]) == (8, [11, 14])
    assert (resumed["rollbacks"], resumed["learningRateFactor"]) == (2, 0.25)
    order = [batch for batch in range(40) if batch not in {8, 9, 10, 13, 14, 15}]
    rates = {**dict.fromkeys(range(1, 9), 1.0), **dict.fromkeys((9, 10), 0.5)}
    reference = train(
        recipe(corpus, "rollback", steps=18), 18,
        batches=lambda s: order[s - 1], factor=lambda s: rates.get(s, 0.25),
    )  # fmt: skip
    assert largest_difference(again.losses(), reference.losses) <= 1e-5


def test_without_a_checkpoint_it_goes_back_to_the_start(corpus: Path, tmp_path: Path) -> None:
    spec = recipe(corpus, "rollback", steps=12)
    gang = Gang(tmp_path, spec, world=2, checkpoint=False, fault="noise_in_batch_9").run()
    (event,) = gang.events("rolled-back")
    assert (event["step"], event["path"], event["leftOut"]) == (0, None, [7, 10])
    reference = undisturbed_but_for(range(7, 10), spec, 12, since=0)
    assert largest_difference(gang.losses(), reference.losses) <= 1e-5


@pytest.mark.parametrize("world", [1, 2])
def test_past_the_budget_the_run_ends_with_70(corpus: Path, tmp_path: Path, world: int) -> None:
    gang = Gang(tmp_path, recipe(corpus, "rollback", steps=60), world=world, every=4, fault="noise_from_batch_9")
    gang.run(expect=ExitCode.NON_FINITE)
    assert [event["rollbacks"] for event in gang.events("rolled-back")] == [1, 2]
    for rank in range(world):
        beat = gang.heartbeat(rank)
        assert beat is not None
        assert beat.failure is not None
        assert (beat.failure.cause, beat.failure.exit) == (Cause.NON_FINITE, ExitCode.NON_FINITE)
        assert "2 rollbacks are spent (stability.budget)" in beat.failure.message
    assert CheckpointStore(str(gang.checkpoints)).find(8) is not None


def test_steps_that_stay_non_finite_roll_back_where_asked(corpus: Path, tmp_path: Path) -> None:
    spec = recipe(corpus, "log", steps=50, onNonFinite="rollback", maxSkippedInARow=2, budget=1)
    gang = Gang(tmp_path, spec, world=2, every=2, fault="nan_from_step_3").run(expect=ExitCode.NON_FINITE)
    (event,) = gang.events("rolled-back")
    assert (event["step"], event["spikeStep"]) == (2, 4)
    beat = gang.heartbeat()
    assert beat is not None
    assert beat.failure is not None
    assert "1 rollbacks are spent" in beat.failure.message


def test_memory_forgets_what_was_undone_and_keeps_the_history(corpus: Path, tmp_path: Path) -> None:
    """The set of step 9 in memory was newer than the checkpoint that the rollback went to; a resume from memory later
    knows of the rollback."""
    spec, memory = recipe(corpus, "rollback", steps=11), {"everySteps": 1, "replicas": 1}
    fields: dict[str, Any] = {"world": 2, "per_node": 1, "every": 4, "memory": memory}
    gang = Gang(tmp_path, spec, fault="noise_in_batch_9", **fields).run()
    assert [event["step"] for event in gang.events("rolled-back")] == [8]
    kept = [row["step"] for row in gang.events("memory-checkpoint")]
    assert kept.count(9) == 2, "saved before the rollback, and again after it"
    shutil.rmtree(gang.checkpoints / "step-00000011")
    again = Gang(tmp_path, {**spec, "until": {"steps": 14}}, attempt=2, **fields).run()
    (resumed,) = again.events("resumed")
    assert (resumed["tier"], resumed["step"]) == ("memory", 10)
    reference = undisturbed_but_for(range(8, 11), spec, 14, since=8)
    assert largest_difference({**gang.losses(), **again.losses()}, reference.losses) <= 1e-5


# --- fp16 ---


def test_fp16_learns_like_fp32_and_the_scaler_agrees_and_is_saved(corpus: Path, tmp_path: Path) -> None:
    scale = {"initial": 1024, "window": 4}
    spec = {**recipe(corpus, "log", steps=8, lossScale=scale), "precision": "fp16"}
    gang = Gang(tmp_path, spec, world=2, every=4, fault="overflow_in_steps_3_and_4").run()
    assert {step for step, skipped in gang.column("skipped").items() if skipped} == {3, 4}
    # Two good steps, two overflows (scale and window halved twice), then each good step grows a window of 1, then 2.
    assert gang.column("lossScale") == {1: 1024, 2: 1024, 3: 1024, 4: 512, 5: 256, 6: 512, 7: 1024, 8: 1024}
    recorded = [(gang.work / f"scaler-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert len(recorded[0]) == 8
    assert recorded[0] == recorded[1]
    reference = train(spec, 8, skip={3, 4}).losses
    assert largest_difference(gang.losses(), reference) <= 2e-2
    store = CheckpointStore(str(gang.checkpoints))
    saved = store.manifest(store.candidates()[0]).meta["stability"]["lossScale"]
    assert saved == json.loads(recorded[0][-1])
    again = Gang(tmp_path, {**spec, "until": {"steps": 9}}, world=1, attempt=2).run()
    assert again.column("lossScale") == {9: saved["scale"]}


def test_an_fp16_overflow_that_lowers_the_scale_does_not_count_as_a_failure(corpus: Path, tmp_path: Path) -> None:
    """A scale far too large finds its level; `maxSkippedInARow` is about what does not go away."""
    scale = {"initial": 2.0**40, "window": 1000}
    spec = {**recipe(corpus, "log", steps=50, lossScale=scale, maxSkippedInARow=2), "precision": "fp16"}
    gang = Gang(tmp_path, spec, world=1, checkpoint=False).run()
    skipped = [step for step, skipped in gang.column("skipped").items() if skipped]
    assert skipped[:6] == [1, 2, 3, 4, 5, 6]
    assert gang.losses()[50] < gang.losses()[1]


def test_defaults_are_those_of_metaseq() -> None:
    scale = StabilitySpec().loss_scale
    assert (scale.initial, scale.factor, scale.window, scale.tolerance) == (4.0, 2.0, 256, 0.0)
    assert (scale.minimum, scale.threshold) == (2**-5, None)
    assert torch.tensor(scale.minimum).item() == 0.03125
