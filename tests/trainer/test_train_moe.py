"""Mixtures of experts through the whole loop: sharded like everything else, and telling how they are used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gang import Gang, make_recipe

SMALL = {"dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": 32}


def _recipe(corpus: Path, **overrides: Any) -> dict[str, Any]:
    model = {"preset": "moe-tiny", "overrides": {**SMALL, **overrides}}
    return make_recipe(corpus, steps=5, model=model)


def test_sharded_experts_train_as_one_process(corpus: Path, tmp_path: Path) -> None:
    """Without dropping and balance loss, which go by the tokens of a micro-batch, so that ranks have different ones."""
    recipe = _recipe(corpus, capacity="dropless", gateLossWeight=0.0)
    alone = Gang(tmp_path / "alone", recipe, world=1, checkpoint=False).run()
    shared = Gang(tmp_path / "shared", recipe, world=2, checkpoint=False).run()
    one, two = alone.losses(), shared.losses()
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    assert max(abs(two[step] / one[step] - 1) for step in one) <= 1e-5
    assert max(abs(a / b - 1) for a, b in zip(alone.column("gradNorm").values(), shared.column("gradNorm").values(),
                                              strict=True)) <= 1e-4  # fmt: skip


def test_the_step_log_tells_how_experts_are_used(corpus: Path, tmp_path: Path) -> None:
    gang = Gang(tmp_path, _recipe(corpus), world=2, checkpoint=False).run()
    for balance in gang.column("balanceLoss").values():
        assert 1.0 - 1e-3 <= balance <= 4.0
    for overflow in gang.column("expertOverflow").values():
        assert 0.0 <= overflow <= 1.0
    for entropy in gang.column("gateEntropy").values():
        assert 0.0 < entropy <= math.log(4) + 1e-6
    assert all(1.0 <= load <= 4.0 for load in gang.column("expertLoad").values())
    losses = gang.losses()
    assert losses[5] < losses[1]
