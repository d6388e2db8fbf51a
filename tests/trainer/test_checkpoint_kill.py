"""`kill -9` at every stage of a save: what is loaded next is the newest committed, never less and never a part."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint_worker import expected, register_bucket, run_cases
from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.checkpointer import STAGES

SIGKILL = 9
COMMITTED_FROM = STAGES.index("renamed")
ON_RANK_0_ONLY = {"manifest-half", "manifest", "fenced", "renamed", "trashed", "retained"}


def killed(root: Path, world: int, rank: int, stage: str, scheme: str = "") -> list[dict[str, Any]]:
    """Step 1 is saved in peace, the save of step 2 is killed; then a gang of another size loads, and saves step 3."""
    kill = {"rank": rank, "stage": stage, "step": 2}
    # keep=1, so that removing the old one is part of the save that is killed.
    common = {"uri": f"{scheme}{root}", "keep": 1}
    return [
        {**common, "mode": "save", "world": world, "attempt": 1, "steps": [1, 2], "kill": kill},
        {**common, "mode": "load", "world": 3 - world, "attempt": 2, "steps": [3]},
    ]


def check(
    stage: str, uri: str, world: int, rank: int, saved: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> None:
    assert saved[rank]["signal"] == SIGKILL, f"{stage}: the hook did not fire: {saved}"
    survivor = 2 if STAGES.index(stage) >= COMMITTED_FROM else 1
    if stage == "gathered" and rank != 0:
        # Rank 0 may have heard all it needs by then. What it says about the outcome is what counts.
        survivor = max(saved[0]["committed"])
    for other in resumed:
        assert other["exit"] == 0
        assert other["step"] == survivor, f"{stage}: {other}"
        assert other["digest"] == expected(survivor)
        assert other["meta"] == {"step": survivor, "position": survivor * 8}
        assert other["world"] == world
        assert other["skipped"] == []
        assert other["committed"] == [3]
        if stage in STAGES[1:COMMITTED_FROM] and rank == 0:
            # Where rank 0 lives it cleans up itself.
            assert len(other["abandoned"]) == 1, f"{stage}: the save cut short is told"
            assert "step-00000002.attempt-1" in other["abandoned"][0]
    store = CheckpointStore(uri)
    assert [candidate.step for candidate in store.candidates()] == [3]
    assert store.verify(store.candidates()[0]) == []
    assert len(store.files.directories()) == 1, "nothing half done is left behind"


@pytest.mark.parametrize("scheme", ["", "bucket://"], ids=["filesystem", "object-store"])
def test_one_rank_killed_at_every_stage(tmp_path: Path, scheme: str) -> None:
    register_bucket()
    roots = {stage: tmp_path / stage for stage in STAGES}
    cases = {stage: killed(root, 1, 0, stage, scheme) for stage, root in roots.items()}
    outcomes = run_cases([case for pair in cases.values() for case in pair])
    for i, (stage, root) in enumerate(roots.items()):
        check(stage, f"{scheme}{root}", 1, 0, *outcomes[2 * i : 2 * i + 2])


@pytest.mark.parametrize(("rank", "scheme"), [(0, ""), (1, ""), (1, "bucket://")])
def test_either_of_two_ranks_killed_at_every_stage(tmp_path: Path, rank: int, scheme: str) -> None:
    register_bucket()
    stages = [stage for stage in STAGES if rank == 0 or stage not in ON_RANK_0_ONLY]
    roots = {stage: tmp_path / stage for stage in stages}
    cases = {stage: killed(root, 2, rank, stage, scheme) for stage, root in roots.items()}
    outcomes = run_cases([case for pair in cases.values() for case in pair])
    for i, (stage, root) in enumerate(roots.items()):
        saved, resumed = outcomes[2 * i : 2 * i + 2]
        assert saved[1 - rank]["signal"] == 0, "the other rank lives and is told"
        if stage in STAGES[: STAGES.index("gathered")]:
            assert len(saved[1 - rank]["failures"]) == 1
            assert "step 2 was not saved" in saved[1 - rank]["failures"][0]
        check(stage, f"{scheme}{root}", 2, rank, saved, resumed)
