"""Every family through the whole loop: sharded it trains as one process does, and resumed on other ranks it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe
from reference import largest_difference
from trireme_api.families import PRESETS

TINY = sorted(name for name in PRESETS if name.endswith("-tiny") and name != "growing-ensemble-tiny")
"""Left out: one member, which is gpt until it grows; test_ensemble.py has it grow."""
CUT, STEPS = 3, 6
TOKENS = SEQUENCES * SEQUENCE
SHAPES: dict[str, dict[str, Any]] = {"growing-tiny": {"splits": "0,1;0,0"}}
"""A family whose preset is the plain model: here it has grown."""


def _recipe(corpus: Path, preset: str, steps: int = STEPS, expert: int = 1) -> dict[str, Any]:
    """Micro-batches of one sequence: the same ones in any world, and with them what is balanced within one."""
    known = PRESETS[preset].config.model_dump(by_alias=True)
    quiet = {name: 0.0 for name in ("dropout", "attentionDropout") if name in known}
    overrides = {**quiet, "maximumPositions": SEQUENCE, **SHAPES.get(preset, {})}
    return make_recipe(
        corpus, steps=steps, model={"preset": preset, "overrides": overrides},
        objective="causal-lm" if PRESETS[preset].config.causal else "masked-lm",
        batch={"tokens": TOKENS, "micro": 1}, parallelism={"expert": expert},
        schedule={"warmupTokens": 2 * TOKENS, "decayTokens": 20 * TOKENS},
    )  # fmt: skip


@pytest.mark.parametrize("preset", TINY)
def test_two_ranks_then_others_are_one_process(corpus: Path, tmp_path: Path, preset: str) -> None:
    """FSDP on two ranks, then resumed on three; where there are experts on four, which share these out in twos."""
    alone = Gang(tmp_path / "alone", _recipe(corpus, preset), checkpoint=False).run()
    world, expert = (4, 2) if hasattr(PRESETS[preset].config, "experts") else (3, 1)
    begun = Gang(tmp_path / "parts", _recipe(corpus, preset, CUT), world=2, every=1000).run()
    again = Gang(tmp_path / "parts", _recipe(corpus, preset, STEPS, expert), world, attempt=2, every=1000).run()
    assert sorted(begun.losses()) == [1, 2, 3]
    assert sorted(again.losses()) == [4, 5, 6]
    for gang in (begun, again):
        assert largest_difference(gang.losses(), alone.losses()) <= 1e-5
        norms, expected = gang.column("gradNorm"), alone.column("gradNorm")
        assert max(abs(norms[step] / expected[step] - 1) for step in norms) <= 1e-4


def test_a_resume_without_the_moments_would_be_seen(corpus: Path, tmp_path: Path) -> None:
    """Negative control for the comparison above."""
    alone = Gang(tmp_path / "alone", _recipe(corpus, "xglm-tiny"), checkpoint=False).run()
    Gang(tmp_path / "parts", _recipe(corpus, "xglm-tiny", CUT), every=1000).run()
    gang = Gang(tmp_path / "parts", _recipe(corpus, "xglm-tiny"), attempt=2, every=1000, fault="forget_moments").run()
    assert largest_difference(gang.losses(), alone.losses()) > 1e-4
