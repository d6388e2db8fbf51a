"""Reports that carry nothing but figures wait for the next write of them; all else is looked at when it comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from trireme_api.protocol import (
    AgentState,
    CheckpointRef,
    EnergyReading,
    Failure,
    Hardware,
    PhaseTime,
    Progress,
    RankReport,
    Report,
    Spent,
)
from trireme_operator.decide.figures import interval, only_figures

BEFORE = Report(
    "uid", 2, AgentState.RUNNING, holding="2-run",
    ranks=[RankReport(0, pid=7, step=40, phase="step", heartbeat_age=0.1)],
    progress=Progress(step=40, loss=3.0), spent=Spent({"step": 20.0}, "step", 0, 40),
    energy={"cpu": EnergyReading(100.0, "rapl")}, hardware=Hardware(50.0, 0, None), phases=PhaseTime(started=1.0),
)  # fmt: skip
AFTER = replace(
    BEFORE, ranks=[RankReport(0, pid=7, step=50, phase="checkpoint", heartbeat_age=0.2, step_seconds=0.5)],
    progress=Progress(step=50, loss=2.9), spent=Spent({"step": 25.0}, "step", 0, 50),
    energy={"cpu": EnergyReading(150.0, "rapl")}, hardware=Hardware(55.0, 0, None),
)  # fmt: skip


def rank(**changes: Any) -> dict[str, Any]:
    return {"ranks": [replace(AFTER.ranks[0], **changes)]}


def test_training_that_goes_on_is_only_figures() -> None:
    assert only_figures(BEFORE, AFTER)
    assert only_figures(BEFORE, replace(AFTER, **rank(step=40, heartbeat_age=1.0))), "a long step is no news"


@pytest.mark.parametrize(
    "changes",
    [
        {"state": AgentState.STOPPING},
        {"attempt": 3},
        {"holding": "2-save-and-stop"},
        {"checkpoint": CheckpointRef(50, "step-50")},
        {"failure": Failure("unknown", "it broke")},
        {"phases": PhaseTime(started=1.0, first_step=9.0)},
        {"ranks": []},
        {"ranks": [*AFTER.ranks, RankReport(1, step=50)]},
        rank(exit=1),
        rank(pid=8),
        rank(step=30),
        rank(step=None),
        rank(step=40, heartbeat_age=30.0),
        rank(step=40, heartbeat_age=None),
    ],
)
def test_all_else_is_looked_at_at_once(changes: dict[str, Any]) -> None:
    assert not only_figures(BEFORE, replace(AFTER, **changes))


def test_many_jobs_write_their_figures_more_seldom() -> None:
    assert interval(5.0, 100) == 5.0
    assert interval(5.0, 1000) == 20.0
    assert interval(30.0, 1000) == 30.0, "who asked for seldom gets it"
