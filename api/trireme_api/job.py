"""TrainingJob: spec and status. The CRD, the API reference and every validation come from these models."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from trireme_api.anytime import StreamStatus
from trireme_api.carbon.policy import CarbonHold as CarbonHold
from trireme_api.carbon.policy import CarbonPolicy as CarbonPolicy
from trireme_api.carbon.policy import CarbonStatus as CarbonStatus
from trireme_api.carbon.policy import EnergyStatus as EnergyStatus
from trireme_api.decisions import DecisionRecord
from trireme_api.failures import DEFAULT_LADDER as DEFAULT_LADDER
from trireme_api.failures import FailurePolicy as FailurePolicy
from trireme_api.failures import FailureRule as FailureRule
from trireme_api.failures import LadderStep as LadderStep
from trireme_api.failures import NodePolicy as NodePolicy
from trireme_api.failures import RestartAction as RestartAction
from trireme_api.failures import RuleAction as RuleAction
from trireme_api.failures import StopWhen as StopWhen
from trireme_api.hang import HangPolicy, HangStatus, Straggler
from trireme_api.ledger import GoodputStatus
from trireme_api.protocol import Cause
from trireme_api.recipe import CheckpointSpec, Recipe
from trireme_api.replicas import Replicas
from trireme_api.schema import InvalidSpec, PositiveInt, Spec, Status, problems
from trireme_api.template import PodTemplate

GROUP = "trireme.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "TrainingJob"
PLURAL = "trainingjobs"
SINGULAR = "trainingjob"
SHORT_NAME = "tj"
MAX_NAME_LENGTH = 52
"""Pod names add node index and incarnation and must stay DNS labels of 63 characters."""


class TimeToLive(Spec):
    """After the end, the TrainingJob and its pods are deleted; left out: kept."""

    succeeded_seconds: int | None = Field(default=None, ge=0)
    failed_seconds: int | None = Field(default=None, ge=0)


class RunPolicy(Spec):
    suspend: bool = False
    """True: agree on a step, save, stop, free the nodes; false again: continue exactly there."""
    active_deadline_seconds: PositiveInt | None = None
    """Longest time from first admission to the end; time suspended or waiting for data is not counted."""
    startup_deadline_seconds: PositiveInt | None = None
    """Longest time from admission of an attempt's pods until all ranks run."""
    ttl: TimeToLive = TimeToLive()
    clean_pod_policy: Literal["All", "Running", "None"] = "Running"
    """Pods removed when the job has ended."""
    warm_start: bool = True
    """Each pod keeps a spare process per rank with the trainer imported, so that a restart in place skips the import;
    about 230 MB of the pod's memory per rank. Own scripts are never warm-started. Read when a pod is made."""


class SchedulingPolicy(Spec):
    gang: Literal["builtin", "none"] = "builtin"
    """builtin: all pods of the gang are created or none, first come first served by priority."""
    priority_class_name: str | None = Field(default=None, max_length=253)


class TrainingJobSpec(Spec):
    recipe: Recipe | None = None
    """What to train. Leave out to run your own script, given in template.image and template.command."""
    replicas: Replicas = Replicas()
    procs_per_node: PositiveInt | Literal["auto"] = "auto"
    """Ranks per pod; auto = GPUs of the pod, or 1."""
    checkpoint: CheckpointSpec | None = None
    template: PodTemplate = PodTemplate()
    run_policy: RunPolicy = RunPolicy()
    failure_policy: FailurePolicy = FailurePolicy()
    hang_policy: HangPolicy = HangPolicy()
    node_policy: NodePolicy = NodePolicy()
    scheduling_policy: SchedulingPolicy = SchedulingPolicy()
    carbon_policy: CarbonPolicy = CarbonPolicy()

    @model_validator(mode="after")
    def _recipe_or_script(self) -> TrainingJobSpec:
        if self.recipe is None and not (self.template.image and self.template.command):
            raise ValueError("give a recipe, or your own script as template.image and template.command")
        if self.recipe is not None and (self.template.command or self.template.args):
            raise ValueError("template.command and template.args are for your own script; with a recipe leave them out")
        if self.recipe is None and self.checkpoint is not None and self.checkpoint.memory is not None:
            raise ValueError("checkpoint.memory is the trainer's; with your own script leave it out")
        streams = self.recipe is not None and self.recipe.anytime is not None
        if streams and self.checkpoint is not None and self.checkpoint.memory is not None:
            raise ValueError("checkpoint.memory goes not with recipe.anytime, whose model may grow; leave it out")
        if self.recipe is not None and self.checkpoint is None:
            raise ValueError("checkpoint.uri is required with a recipe, or a failure would cost the whole run")
        return self


class Phase(StrEnum):
    INVALID = "Invalid"
    PENDING = "Pending"
    """Not admitted yet: waits for room for the whole gang."""
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    WAITING = "Waiting"
    """For the next mega-batch of `recipe.anytime`; holds no nodes."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


TERMINAL = frozenset({Phase.SUCCEEDED, Phase.FAILED})


class ConditionType(StrEnum):
    INVALID = "Invalid"
    SUSPENDED = "Suspended"
    ADMITTED = "Admitted"
    INITIALIZED = "Initialized"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    EDIT_IGNORED = "EditIgnored"
    SHRUNK = "Shrunk"
    OVER_CARBON_BUDGET = "OverCarbonBudget"
    INTENSITY_FALLBACK = "IntensityFallback"
    """No live carbon intensity where one is set up."""
    WAITING_FOR_DATA = "WaitingForData"


class Condition(Status):
    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str
    observed_generation: int = 0


class Slot(Status):
    """One place in the gang. The pod's name follows from it, written before the pod is made."""

    index: int
    incarnation: int
    """The attempt this slot's pod was made for: rises when the pod is to be replaced, an older one is garbage then."""
    pod_uid: str | None = None
    """The pod that was seen to fill this slot. Ranks start only in recorded pods; a recorded pod that is gone is a
    failure, a missing one that was never recorded is still to be created."""
    spare: bool = False
    """Held ready without ranks. Among the others the order in `slots` is that of the node ranks."""


class ProgressStatus(Status):
    step: int = 0
    best_step: int = 0
    """The furthest step ever reached: what counts as progress between failures."""
    total_steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    step_seconds: float | None = None
    """Median seconds per step; what `hangPolicy.stepTimeout: auto` is measured by."""
    eta: str | None = None
    """RFC 3339 time at which the run would end at this speed."""
    remaining: str | None = None
    """The same as a duration, for the printer column."""


class CheckpointStatus(Status):
    step: int
    path: str
    seen_at: str | None = None


class RestartRecord(Status):
    at: str
    action: RestartAction
    cause: Cause
    step: int = 0
    """The furthest step reached at the time: tells whether anything was gained since."""
    attempt: int
    """The attempt that this restart began."""
    charged: bool = True
    """False: does not count against the budget (a rule says so, or it was taken)."""
    taken: bool = False
    """True: the API server says that the cluster took the pod away; says nothing of the job."""
    node: str | None = None
    """Where the failure began."""


class Restarts(Status):
    process: int = 0
    pod: int = 0
    gang: int = 0
    by_cause: dict[str, int] = Field(default_factory=dict)
    recent: list[RestartRecord] = Field(default_factory=list)
    """Within the failure window; what budgets are counted from."""


class RecoveryPhases(Status):
    """Seconds of the last recovery by phase, by the operator's clock; load and firstStep by the trainer's."""

    detect: float | None = None
    decide: float | None = None
    fence: float | None = None
    replace: float | None = None
    rendezvous: float | None = None
    load: float | None = None
    first_step: float | None = None


class LastFailure(Status):
    cause: Cause
    message: str
    at: str
    attempt: int
    rank: int | None = None
    pod: str | None = None
    node: str | None = None
    exit: int | None = None
    rule: str | None = None
    """The signal that classified it, or the name of the rule in spec.failurePolicy.rules that fitted."""
    cascade: bool = False
    """True: only consequences of a failure were seen; corrected when the failure itself is told later."""
    missing_ranks: list[int] = Field(default_factory=list)
    """After a hang: the ranks that the others waited for."""
    stacks: str | None = None
    """After a hang: where the stacks of the ranks were saved."""
    phases: RecoveryPhases = Field(default_factory=RecoveryPhases)


class AvoidedNode(Status):
    name: str
    until: str
    reason: str = ""


class ReplicaStatus(Status):
    desired: int = 0
    size: int = 0
    """Nodes of the gang in this attempt; less than desired when it has shrunk."""
    created: int = 0
    ready: int = 0
    """Pods whose ranks run."""
    spares: int = 0
    """Pods that wait to take the place of a lost one."""
    selector: str = ""
    """Label selector of the pods, for the scale subresource."""


class Sizing(Status):
    """Changes of the gang's size."""

    target: int | None = None
    """The size for which the ranks are just saving; the next attempt has it."""
    since: str | None = None
    """When they were asked to."""
    reason: str = ""
    """Why the gang last got the size it has."""
    not_before: str | None = None
    """Not grown again before this time, so that a flapping node does not make the gang flap."""
    shrunk_at: list[str] = Field(default_factory=list)
    """When it had to shrink, within the failure window; each time it waits longer before it grows."""
    scaled: bool = False
    """`desired` was changed while the gang ran and is not reached yet."""
    asked_at: str | None = None
    """When the newest spares were asked for."""


class Queueing(Status):
    """Attempts to get the whole gang placed that had to be given up."""

    requeues: int = 0
    not_before: str | None = None
    """Not admitted again before this time."""


class TrainingJobStatus(Status):
    phase: Phase | None = None
    reason: str = ""
    """Why it is in this phase, in one word; `explanation` says it in a sentence."""
    observed_generation: int = 0
    conditions: list[Condition] = Field(default_factory=list)
    decisions: list[DecisionRecord] = Field(default_factory=list)
    """What the operator decided: the first and the newest. Events say the same, but only for an hour."""
    attempt: int = 0
    attempt_started_at: str | None = None
    slots: list[Slot] = Field(default_factory=list)
    node_summary: str = ""
    """ready/desired, for the printer column."""
    replicas: ReplicaStatus = Field(default_factory=ReplicaStatus)
    progress: ProgressStatus | None = None
    last_checkpoint: CheckpointStatus | None = None
    resume_from: CheckpointStatus | None = None
    """The newest committed checkpoint known when this attempt began; the trainer checks it and looks itself."""
    restarts: Restarts = Field(default_factory=Restarts)
    restart_count: int = 0
    budgets_left: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Restarts left by cause and step of the ladder; causes that have used none have all of spec.failurePolicy."""
    avoided_nodes: list[AvoidedNode] = Field(default_factory=list)
    """Nodes that get no pod of this job for a while (spec.nodePolicy)."""
    draining: list[str] = Field(default_factory=list)
    """Nodes that the job is leaving: its pods there save and are replaced elsewhere."""
    last_failure: LastFailure | None = None
    hang: HangStatus | None = None
    stragglers: list[Straggler] = Field(default_factory=list)
    energy: EnergyStatus = Field(default_factory=EnergyStatus)
    carbon: CarbonStatus = Field(default_factory=CarbonStatus)
    carbon_hold: CarbonHold = Field(default_factory=CarbonHold)
    goodput: GoodputStatus | None = None
    stream: StreamStatus | None = None
    admitted_at: str | None = None
    """First admission; the active deadline counts from here."""
    admitted_spec: dict[str, Any] | None = None
    """The spec this gang was made from: edits while it is admitted take effect after suspend and resume."""
    sizing: Sizing = Field(default_factory=Sizing)
    queueing: Queueing = Field(default_factory=Queueing)
    stopping_since: str | None = None
    """When the ranks were asked to save and stop."""
    suspended_at: str | None = None
    suspended_seconds: float = 0.0
    start_time: str | None = None
    completion_time: str | None = None
    explanation: str = ""
    """What it is doing, why, and what happens next, in one sentence."""
    updated_at: str | None = None
    """When the operator last wrote this status."""


def parse_spec(data: Any) -> TrainingJobSpec:
    """The typed spec of a manifest's `spec`. Raises InvalidSpecs with every problem found, each naming its field."""
    if not isinstance(data, dict):
        raise InvalidSpecs([InvalidSpec("spec", "is required and must be an object")])
    try:
        return TrainingJobSpec.model_validate(data)
    except ValidationError as error:
        raise InvalidSpecs(problems(error, known=field_names(TrainingJobSpec), prefix="spec.")) from None


class InvalidSpecs(ValueError):
    def __init__(self, found: list[InvalidSpec]) -> None:
        super().__init__("; ".join(str(item) for item in found))
        self.found = found


def field_names(model: type[Spec]) -> set[str]:
    """All field names of the spec as written in YAML, for suggestions."""
    names: set[str] = set()

    def visit(schema: Any) -> None:
        if isinstance(schema, dict):
            properties = schema.get("properties")
            if isinstance(properties, dict):
                names.update(properties)
            for value in schema.values():
                visit(value)
        elif isinstance(schema, list):
            for value in schema:
                visit(value)

    visit(model.model_json_schema(by_alias=True))
    return names


def pod_name(job: str, slot: Slot) -> str:
    return f"{job}-{slot.index}-{slot.incarnation}"
