"""spec.failurePolicy and spec.nodePolicy: the restart ladder, its budgets, rules about single failures, sick nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trireme_api.protocol import Cause
from trireme_api.schema import PositiveInt, Spec

RestartAction = Literal["RestartProcess", "ReplacePod", "RestartGang"]


class LadderStep(Spec):
    action: RestartAction
    max: int = Field(ge=0, le=10_000)
    """Restarts of this kind that one cause may use within the window before the next step of the ladder is taken."""
    timeout_seconds: PositiveInt | None = None
    """If the gang does not run again within this time, the next step is taken."""


DEFAULT_LADDER = (
    LadderStep(action="RestartProcess", max=3, timeout_seconds=120),
    LadderStep(action="ReplacePod", max=5, timeout_seconds=300),
    LadderStep(action="RestartGang", max=3, timeout_seconds=600),
)


RuleAction = Literal["Ladder", "RestartProcess", "ReplacePod", "RestartGang", "Fail"]


class FailureRule(Spec):
    """What to do about a failure that one can tell by its signs. All signs that are given must be there, each in one
    of its forms; of several rules the first that fits counts."""

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    """Named in status.lastFailure.rule and in events."""
    on_exit_codes: tuple[Annotated[int, Field(ge=1, le=255)], ...] = Field(default=(), max_length=32)
    """Exit codes of the rank that failed first; 128 + n for one that died of signal n."""
    on_pod_conditions: tuple[Literal["DisruptionTarget"], ...] = Field(default=(), max_length=4)
    """Conditions of its pod that are true."""
    on_log_patterns: tuple[Annotated[str, Field(min_length=1, max_length=512)], ...] = Field(default=(), max_length=16)
    """RE2 expressions searched for in its failure message and traceback. A hint: a rank can write what it likes."""
    cause: Cause | None = None
    """What the failure counts as; left out: as it was classified."""
    action: RuleAction = "Ladder"
    """Ladder: as usual. A step of the ladder: this one or a stronger one. Fail: the job ends."""
    counts_against_budget: bool = True
    """False: restarts for it use up no budget; they still end when nothing is gained (stopWhen)."""
    avoid_node: bool = False
    """True: the node is avoided at once (nodePolicy.avoidForSeconds)."""

    @model_validator(mode="after")
    def _some_sign(self) -> FailureRule:
        if not (self.on_exit_codes or self.on_pod_conditions or self.on_log_patterns):
            raise ValueError("give at least one of onExitCodes, onPodConditions, onLogPatterns")
        return self


class StopWhen(Spec):
    same_cause_without_progress: PositiveInt = 3
    """So many failures of one cause in a row without a newer committed checkpoint or step end the job."""


class FailurePolicy(Spec):
    window_seconds: PositiveInt = 21_600
    """Restarts older than this no longer count."""
    ladder: tuple[LadderStep, ...] = Field(default=DEFAULT_LADDER, min_length=1, max_length=8)
    rules: tuple[FailureRule, ...] = Field(default=(), max_length=32)
    stop_when: StopWhen = StopWhen()


class NodePolicy(Spec):
    """Which nodes this job keeps away from. Nodes themselves are never touched: they are others' to repair."""

    avoid_after_failures: int = Field(default=2, ge=0)
    """Failures of the infrastructure, of the network or by hanging that began on one node within the failure policy's
    window before the job avoids it; 0: never. Never so many nodes that the gang would not fit the others."""
    avoid_for_seconds: PositiveInt = 86_400
    leave_cordoned: bool = True
    """Pods on a node that is cordoned, or gets a NoSchedule or NoExecute taint they do not tolerate, save and move if
    the other nodes could hold the gang. False: they stay until they are evicted, and save then."""
