"""Sparse all-MLP, and each router, through the whole loop: one process, FSDP, FSDP with experts shared out, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe

SMALL = {"dropout": 0.0, "maximumPositions": 32, "width": 32, "innerWidth": 64, "spatialExperts": 4}
SCHEDULE = {"warmupTokens": 2 * SEQUENCES * SEQUENCE, "decayTokens": 20 * SEQUENCES * SEQUENCE}


def _recipe(corpus: Path, steps: int, expert: int = 1, preset: str = "smlp-tiny", **overrides: Any) -> dict[str, Any]:
    """Micro-batches of one sequence: the same ones in any world, and with them what is balanced within one."""
    return make_recipe(
        corpus, steps=steps, model={"preset": preset, "overrides": {**SMALL, **overrides}}, schedule=SCHEDULE,
        batch={"tokens": SEQUENCES * SEQUENCE, "micro": 1}, parallelism={"expert": expert, "logCollectives": True},
    )  # fmt: skip


def _same(gang: Gang, alone: Gang) -> None:
    for column, tolerance in (("loss", 1e-6), ("gradNorm", 1e-5)):
        found, wanted = gang.column(column), alone.column(column)
        assert found
        assert max(abs(found[step] / wanted[step] - 1) for step in found) <= tolerance
    (told,) = gang.events("collectives")
    assert told["ranksInAnotherOrder"] == []


VARIANTS: dict[str, dict[str, Any]] = {
    "base, partial": {"spatialRouting": "partial"},
    "top-1": {"router": "top-1"},
    "hash": {"router": "hash"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_router_trains_as_one_process(corpus: Path, tmp_path: Path, variant: str) -> None:
    """With FSDP, and with FSDP and the experts shared out."""
    alone = Gang(tmp_path / "alone", _recipe(corpus, 3, **VARIANTS[variant]), world=1, checkpoint=False).run()
    for world, expert in ((2, 1), (4, 2)):
        recipe = _recipe(corpus, 3, expert, **VARIANTS[variant])
        _same(Gang(tmp_path / f"{world}", recipe, world=world, checkpoint=False).run(), alone)


def test_a_run_resumed_on_other_ranks_is_the_run(corpus: Path, tmp_path: Path) -> None:
    """Two ranks that share the experts out, three without, one; balanced assignment throughout."""
    alone = Gang(tmp_path / "alone", _recipe(corpus, 7), world=1, every=1000).run()
    layouts = [(2, 2, 3), (3, 1, 5), (1, 1, 7)]
    for attempt, (world, expert, steps) in enumerate(layouts, start=1):
        recipe = _recipe(corpus, steps, expert)
        gang = Gang(tmp_path / "resumed", recipe, world=world, attempt=attempt, every=1000).run()
        assert max(gang.losses()) == steps
        assert min(gang.losses()) == (1 if attempt == 1 else layouts[attempt - 2][2] + 1)
        _same(gang, alone)
        assert max(gang.column("expertOverflow").values()) == 0.0
    losses = alone.losses()
    assert losses[7] < losses[1]


def test_a_checkpoint_of_another_router_is_refused(corpus: Path, tmp_path: Path) -> None:
    Gang(tmp_path, _recipe(corpus, 1), world=1, every=1000).run()
    other = Gang(tmp_path, _recipe(corpus, 2, router="top-1"), world=1, attempt=2, every=1000).run(expect=64)
    assert "router" in other.logs()
