"""The loss scaler against metaseq's rule step by step, which batches a rollback leaves out, what is judged a spike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trireme_api.recipe import LossScaleSpec, Recipe
from trireme_trainer.lifecycle.outcome import NonFinite
from trireme_trainer.optimization.history import History
from trireme_trainer.optimization.loss_scale import LossScaler
from trireme_trainer.optimization.stability import RollBack, Stability, Verdict

CPU = torch.device("cpu")


@dataclass
class ByHand:
    """The rule as the paper's code states it, one statement per sentence, in plain numbers."""

    scale: float
    factor: float
    window: float
    tolerance: float
    threshold: float | None
    minimum: float
    now: int = 0
    last_overflow: int = -1
    last_change: int = -1
    overflows: int = 0

    def step(self, overflow: bool) -> tuple[float, float]:
        if not overflow:
            if (self.now - self.last_overflow) % self.window == 0:
                self.scale *= self.factor
                self.window *= self.factor
                self.last_change = self.now
        else:
            before = self.scale
            self.overflows += 1
            share = self.overflows / (self.now - self.last_change)
            if share >= self.tolerance:
                self.scale /= self.factor
                self.window = max(int(self.window / self.factor), 1)
                if self.threshold is not None:
                    self.scale = max(self.scale, self.threshold)
                self.last_change = self.now
                self.overflows = 0
            if self.scale < self.minimum:
                self.scale = before
            self.last_overflow = self.now
            self.now += 1
            return self.scale, self.window
        self.now += 1
        return self.scale, self.window


def trace(spec: LossScaleSpec, overflows: Sequence[bool]) -> list[tuple[float, float]]:
    scaler = LossScaler(spec, CPU)
    found = []
    for overflow in overflows:
        before = float(scaler.scale)
        lowered = bool(scaler.update(torch.tensor(overflow)))
        saved = scaler.saved()
        assert lowered == (saved["scale"] < before)
        found.append((saved["scale"], saved["window"]))
    return found


def by_hand(spec: LossScaleSpec, overflows: Sequence[bool]) -> list[tuple[float, float]]:
    rule = ByHand(spec.initial, spec.factor, spec.window, spec.tolerance, spec.threshold, spec.minimum)
    return [rule.step(overflow) for overflow in overflows]


def test_a_scripted_sequence_number_by_number() -> None:
    """Window 4: grows at the fourth step (counted from −1), the window with it; each overflow halves both."""
    overflows = [False] * 4 + [False] * 3 + [True] + [False] * 4 + [True, True] + [False] * 2
    expected = [
        (4, 4), (4, 4), (4, 4), (8, 8), (8, 8), (8, 8), (8, 8), (4, 4), (4, 4), (4, 4), (4, 4), (8, 8), (4, 4), (2, 2),
        (2, 2), (4, 4),
    ]  # fmt: skip
    assert trace(LossScaleSpec(window=4), overflows) == expected


def test_opts_defaults_first_grow_at_step_256_and_then_512_later() -> None:
    found = trace(LossScaleSpec(), [False] * 1100)
    changes = [i for i in range(1, 1100) if found[i] != found[i - 1]]
    assert changes == [255, 511, 1023], "multiples of the window as it is then, counted from before the first step"
    assert found[-1] == (32, 2048)


def test_below_the_minimum_the_scale_stays_and_the_window_shrinks() -> None:
    found = trace(LossScaleSpec(initial=0.125, window=8), [True] * 5)
    assert found == [(0.0625, 4), (0.03125, 2), (0.03125, 1), (0.03125, 1), (0.03125, 1)]


def test_opt_175bs_threshold_floors_the_scale() -> None:
    assert trace(LossScaleSpec(initial=1, threshold=0.25), [True] * 4)[-1][0] == 0.25


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_is_traced_exactly(seed: int) -> None:
    dice = random.Random(seed)
    spec = LossScaleSpec(
        initial=2.0 ** dice.randint(-4, 8), factor=dice.choice([2.0, 2.0, 1.5]), window=dice.choice([1, 2, 3, 7, 16]),
        tolerance=dice.choice([0.0, 0.0, 0.1, 0.5]), threshold=dice.choice([None, 0.25]),
    )  # fmt: skip
    often = dice.choice([0.02, 0.1, 0.5])
    overflows = [dice.random() < often for _ in range(400)]
    assert trace(spec, overflows) == by_hand(spec, overflows)


def test_saved_in_the_middle_it_goes_on_identically() -> None:
    dice = random.Random(5)
    overflows = [dice.random() < 0.1 for _ in range(200)]
    spec = LossScaleSpec(window=5, tolerance=0.2)
    first, second = LossScaler(spec, CPU), LossScaler(spec, CPU)
    for overflow in overflows[:97]:
        first.update(torch.tensor(overflow))
    second.load(first.saved())
    for overflow in overflows[97:]:
        first.update(torch.tensor(overflow))
        second.update(torch.tensor(overflow))
    assert first.saved() == second.saved()


# --- which batches are left out ---


@pytest.mark.parametrize(
    ("step", "to", "window", "left_out"),
    [
        (10, 8, 1, (9, 10)),
        (10, 8, 2, (8, 10)),
        (10, 8, 3, (8, 11)),
        (10, 0, 3, (7, 10)),
        (10, 9, 100, (9, 109)),
    ],
)
def test_the_window_ends_with_the_spike_or_begins_at_the_checkpoint(
    step: int, to: int, window: int, left_out: tuple[int, int]
) -> None:
    history = History()
    assert history.roll_back(step, to, skip_window=window, learning_rate_factor=0.5) == left_out
    assert history.left_out == [left_out]


@pytest.mark.parametrize("seed", range(30))
def test_no_batch_is_trained_on_twice_and_none_of_the_window_once(seed: int) -> None:
    dice = random.Random(seed)
    history, gone = History(), set()
    for count in range(1, 6):
        step = dice.randint(1, 60)
        to = dice.randint(0, step - 1)
        before = [history.batch_of(s) for s in range(to)]
        spiked = history.batch_of(step - 1)
        window = dice.randint(1, 20)
        first, end = history.roll_back(step, to, skip_window=window, learning_rate_factor=0.9)
        assert first <= spiked < end
        assert [history.batch_of(s) for s in range(to)] == before, "what the checkpoint was trained on stays"
        gone = {batch for first, end in history.left_out for batch in range(first, end)}
        order = [history.batch_of(s) for s in range(200)]
        assert order == sorted(set(range(200 + len(gone))) - gone)[:200]
        assert set(range(first, end)) <= gone
        assert history.rollbacks == count
    assert History.load(history.saved()) == history
    assert len(gone) > 0


# --- judging ---


def stability(precision: str = "fp32", device: torch.device = CPU, **spec: Any) -> Stability:
    recipe = {
        "model": {"preset": "opt-tiny"}, "data": {"sources": [{"path": str(Path("/x"))}]}, "batch": {"tokens": 2048},
        "until": {"steps": 5}, "precision": precision, "stability": spec,
    }  # fmt: skip
    return Stability(Recipe.model_validate(recipe), device)


def judge(watch: Stability, loss: float, norm: float = 1.0) -> tuple[Verdict, bool, float]:
    judged = watch.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
    verdict, skipped = Verdict(int(judged.verdict)), bool(judged.skip)
    assert skipped == watch.skips(verdict)
    return verdict, skipped, float(judged.expected)


def test_the_mean_is_the_exponentially_weighted_one_of_span_9() -> None:
    watch, losses = stability(), [5.0, 4.0, 4.5, 3.0, 3.2]
    weights = [0.8 ** (4 - i) for i in range(5)]
    for loss in losses:
        judge(watch, loss)
    expected = sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights)
    assert judge(watch, 3.0)[2] == pytest.approx(expected, rel=1e-12)


def test_nothing_is_judged_before_the_span_is_full() -> None:
    watch = stability(spikeSpan=4)
    assert [judge(watch, loss)[0] for loss in (1.0, 9.0, 1.0, 9.0)] == [Verdict.GOOD] * 4
    assert judge(watch, 99.0)[0] == Verdict.SPIKE


@pytest.mark.parametrize(("policy", "skipped"), [("log", False), ("skip", True), ("rollback", True)])
def test_a_spike_is_skipped_on_the_device_unless_it_is_only_logged(policy: str, skipped: bool) -> None:
    watch = stability(onSpike=policy)
    for _ in range(9):
        judge(watch, 2.0)
    assert judge(watch, 2.99)[:2] == (Verdict.GOOD, False)
    before = judge(watch, 9.0)
    assert before[:2] == (Verdict.SPIKE, skipped)
    # What is not trained on does not move the mean either.
    assert (judge(watch, 2.0)[2] == before[2]) is skipped


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan"))])
@pytest.mark.parametrize("policy", ["log", "skip", "rollback"])
def test_what_is_not_finite_never_touches_weights(policy: str, loss: float, norm: float) -> None:
    watch = stability(onSpike=policy)
    for _ in range(9):
        judge(watch, 2.0)
    verdict, skipped, expected = judge(watch, loss, norm)
    assert (verdict, skipped) == (Verdict.NON_FINITE, True)
    assert judge(watch, 2.0)[2] == expected == pytest.approx(2.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_judging_never_asks_the_host(precision: str) -> None:
    """On the meta device a tensor has no value: whatever waited for one would raise."""
    meta = torch.device("meta")
    watch = stability(precision, meta, onSpike="rollback")
    judged = watch.judge(torch.zeros((), dtype=torch.float64, device=meta), torch.zeros((), device=meta))
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(judged.verdict)


def test_an_overflow_in_fp16_is_one_only_while_it_lowers_the_scale() -> None:
    watch = stability("fp16", lossScale={"initial": 2.0**-4})
    kinds = [judge(watch, 2.0, float("inf"))[0] for _ in range(3)]
    assert kinds == [Verdict.OVERFLOW, Verdict.NON_FINITE, Verdict.NON_FINITE]


def test_the_budget_is_counted_over_the_whole_run() -> None:
    watch = stability(onSpike="rollback", budget=1, lrFactor=0.5)
    told = {"loss": 9.0, "gradient_norm": 1.0, "expected": 2.0}
    with pytest.raises(RollBack, match=r"step 12: loss 9\.0000 is 4\.50 × the mean") as raised:
        watch.observe(12, Verdict.SPIKE, **told)
    assert raised.value.step == 12
    watch.went_back(12, 10)
    resumed = stability(onSpike="rollback", budget=1)
    resumed.load({"stability": watch.saved()})
    assert resumed.history == watch.history
    with pytest.raises(NonFinite, match=r"1 rollbacks are spent \(stability\.budget\)"):
        resumed.observe(20, Verdict.SPIKE, **told)


def test_skipped_spikes_in_a_row_end_the_run() -> None:
    watch = stability(onSpike="skip", maxSkippedInARow=2)
    told = {"loss": 9.0, "gradient_norm": 1.0, "expected": 2.0}
    watch.observe(1, Verdict.SPIKE, **told)
    watch.observe(2, Verdict.GOOD, **told)
    watch.observe(3, Verdict.SPIKE, **told)
    with pytest.raises(NonFinite, match="2 steps in a row were skipped"):
        watch.observe(4, Verdict.SPIKE, **told)


def test_a_checkpoint_without_any_of_it_starts_anew() -> None:
    watch = stability("fp16")
    judge(watch, 2.0)
    watch.went_back(3, 1)
    watch.load({})
    assert watch.saved() == stability("fp16").saved()
