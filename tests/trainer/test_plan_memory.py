"""Memory that `trireme plan` predicts, against every tensor alive in real steps (benchmarks/plan), a few cases anew."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from trireme_api.families.memory import positions_at_once

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "plan"))

from plan_cases import Case, case
from plan_live import peak

SMALL = {"layers": 4, "width": 96}
CASES = (
    case("opt-tiny", plain=True, **SMALL),
    case("gpt-tiny", parallelism={"shard": "grad-op"}, micro_batches=2, checkpointing=True, plain=True, **SMALL),
    case("normformer-tiny", parallelism={"shard": "hybrid", "shardSize": 2}, precision="fp32", plain=True, **SMALL),
    case("moe-tiny", parallelism={"expert": 2}, plain=True, **SMALL),
    case("normformer-tiny", parallelism={"tensor": 2}, plain=True, **SMALL),
    case("xlmr-tiny", **SMALL),
    case("opt-tiny", micro=4, plain=True, few={"outerGrad": "accumulate", "examples": 2}, **SMALL),
    case("opt-tiny", micro=4, plain=True, few={"outerGrad": "final", "examples": 2}, **SMALL),
    case("ensemble-tiny", parallelism={"shard": "grad-op"}, micro_batches=2, plain=True, members=3, **SMALL),
    case("growing-ensemble-tiny", plain=True, grown=2, **SMALL),
)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_a_step_peaks_where_the_plan_says(one: Case) -> None:
    assert one.setting.memory().total == pytest.approx(peak(one.setting), rel=0.1)


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.begun: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.begun[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("outer", "passes", "reductions"), [("accumulate", 4, 4), ("final", 5, 1)])
def test_a_few_shot_step_gathers_and_reduces_as_often_as_the_plan_says(
    outer: str, passes: int, reductions: int
) -> None:
    setting = case("opt-tiny", micro=4, plain=True, few={"outerGrad": outer, "examples": 2}, **SMALL).setting
    assert (setting.passes, setting.spread.reductions) == (passes, reductions)
    with Collectives() as seen:
        peak(setting)
    steps, blocks = 2, setting.config.layers
    # Blocks are gathered for either direction, the root once.
    assert seen.begun["c10d._allgather_base_.default"] == steps * passes * (2 * blocks + 1)
    assert seen.begun["c10d._reduce_scatter_base_.default"] == steps * reductions * (blocks + 1)


def test_what_is_counted_moves_with_the_setting() -> None:
    """Else any bound would hold."""
    kept, again = (peak(case("opt-tiny", checkpointing=c, plain=True, **SMALL).setting) for c in (False, True))
    assert again < 0.9 * kept


def test_the_loss_is_taken_in_the_chunks_that_are_counted() -> None:
    from trireme_trainer.objectives.cross_entropy import ChunkedCrossEntropy

    assert ChunkedCrossEntropy(50272)._chunk == positions_at_once(50272) == 2669
