"""Mixtures of experts through the whole loop: sharded like everything else, and telling how they are used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe
from reference import saved_weights

SMALL = {"dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": 32}


SCHEDULE = {"warmupTokens": 2 * SEQUENCES * SEQUENCE, "decayTokens": 20 * SEQUENCES * SEQUENCE}


def _recipe(corpus: Path, steps: int = 5, expert: int = 1, micro: int = 2, **overrides: Any) -> dict[str, Any]:
    return make_recipe(
        corpus, steps=steps, model={"preset": "moe-tiny", "overrides": {**SMALL, **overrides}}, schedule=SCHEDULE,
        batch={"tokens": SEQUENCES * SEQUENCE, "micro": micro}, parallelism={"expert": expert, "logCollectives": True},
    )  # fmt: skip


def _same(gang: Gang, alone: Gang) -> None:
    for column, tolerance in (("loss", 1e-6), ("gradNorm", 1e-5)):
        found, wanted = gang.column(column), alone.column(column)
        assert found
        assert max(abs(found[step] / wanted[step] - 1) for step in found) <= tolerance
    (told,) = gang.events("collectives")
    assert told["ranksInAnotherOrder"] == []


@pytest.mark.parametrize(("world", "expert"), [(2, 1), (4, 2)], ids=["fsdp", "fsdp and experts"])
def test_dropless_experts_train_as_one_process(
    corpus: Path, tmp_path: Path, alone_dropless: Gang, world: int, expert: int
) -> None:
    """A micro-batch of one sequence is the same one in any world, and with it its balance loss."""
    recipe = _recipe(corpus, 3, expert, micro=1, capacity="dropless")
    _same(Gang(tmp_path, recipe, world=world, checkpoint=False).run(), alone_dropless)


@pytest.fixture(scope="module")
def alone_dropless(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    recipe = _recipe(corpus, 3, micro=1, capacity="dropless")
    return Gang(tmp_path_factory.mktemp("alone"), recipe, world=1, checkpoint=False).run()


def test_experts_are_shared_out_anew_by_every_resume(corpus: Path, tmp_path: Path) -> None:
    """Two ranks with half the experts each, two ranks with a half of every weight, four ranks that are both: one run,
    that of one process, the tokens that find no place included."""
    small = {"micro": 1, "capacityFactor": 1.0, "width": 32}
    alone = Gang(tmp_path / "alone", _recipe(corpus, 7, **small), world=1, every=1000).run()
    layouts = [(2, 2, 3), (2, 1, 5), (4, 2, 7)]
    for attempt, (world, expert, steps) in enumerate(layouts, start=1):
        recipe = _recipe(corpus, steps, expert, **small)
        gang = Gang(tmp_path / "shared", recipe, world=world, attempt=attempt, every=1000).run()
        assert max(gang.losses()) == steps
        assert min(gang.losses()) == (1 if attempt == 1 else layouts[attempt - 2][2] + 1)
        _same(gang, alone)
        assert min(gang.column("expertOverflow").values()) > 0.1
    (step, ours), (_, theirs) = (saved_weights(g.checkpoints, g.recipe) for g in (gang, alone))
    assert step == 7
    difference = torch.cat([(ours[n] - w).abs().flatten() for n, w in theirs.items() if not n.endswith("k_proj.bias")])
    assert float((difference > 1e-6).float().mean()) <= 1e-3
    assert float(difference.max()) <= 1e-4


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
