"""Memory that `trireme plan` predicts, against every tensor alive in real steps (benchmarks/plan), a few cases anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
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
)


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_a_step_peaks_where_the_plan_says(one: Case) -> None:
    assert one.setting.memory().total == pytest.approx(peak(one.setting), rel=0.1)


def test_what_is_counted_moves_with_the_setting() -> None:
    """Else any bound would hold."""
    kept, again = (peak(case("opt-tiny", checkpointing=c, plain=True, **SMALL).setting) for c in (False, True))
    assert again < 0.9 * kept


def test_the_loss_is_taken_in_the_chunks_that_are_counted() -> None:
    from trireme_trainer.objectives.cross_entropy import ChunkedCrossEntropy

    assert ChunkedCrossEntropy(50272)._chunk == positions_at_once(50272) == 2669
