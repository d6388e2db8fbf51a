"""What agent and coordinator say to each other, and what a rank is given: messages, environment, exit codes.

Standard library only and Python 3.9 syntax: the agent carries this module into images we did not make.
Messages travel as JSON with camelCase keys; unknown keys are ignored, so that an operator and an agent of
neighbouring versions understand each other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Dict, List, Optional

from trireme_api.energy import MISSING as MISSING
from trireme_api.energy import SOURCES as SOURCES
from trireme_api.energy import EnergyReading as EnergyReading
from trireme_api.energy import Hardware as Hardware
from trireme_api.shards import MemoryShards as MemoryShards
from trireme_api.shards import by_set as by_set
from trireme_api.shards import newest_whole as newest_whole
from trireme_api.shards import parse_shard as parse_shard
from trireme_api.spent import SPENT_STATES as SPENT_STATES
from trireme_api.spent import Reached as Reached
from trireme_api.spent import Spent as Spent
from trireme_api.wire import Message
from trireme_api.wire import ProtocolError as ProtocolError
from trireme_api.wire import clean_text as clean_text

PROTOCOL_VERSION = 1
TOKEN_AUDIENCE = "trireme"
COORDINATOR_PORT = 8443
AGENT_METRICS_PORT = 9400
TRAINER_METRICS_PORT = 9401
MASTER_PORT_BASE = 29400
MASTER_PORT_SPAN = 1000
PVC_ROOT = "/mnt/pvc"
"""Where the operator mounts the claims a job names; `pvc://claim/dir` is `/mnt/pvc/claim/dir` in the pod."""
REPORT_PATH = "/v1/namespaces/{namespace}/trainingjobs/{name}/pods/{pod}/report"


class Env:
    """Environment of a rank (works for any `env://` script) and of the agent."""

    RANK = "RANK"
    LOCAL_RANK = "LOCAL_RANK"
    WORLD_SIZE = "WORLD_SIZE"
    LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
    GROUP_RANK = "GROUP_RANK"
    MASTER_ADDR = "MASTER_ADDR"
    MASTER_PORT = "MASTER_PORT"
    ATTEMPT = "TRIREME_ATTEMPT"
    RECIPE = "TRIREME_RECIPE"
    """The recipe as JSON text, or the path of a JSON or YAML file."""
    CHECKPOINT = "TRIREME_CHECKPOINT"
    """The job's `spec.checkpoint` as JSON text (uri, everySteps, keep)."""
    RESUME = "TRIREME_RESUME"
    """JSON {step, path}: the newest checkpoint the control plane knows of; a hint, the trainer looks itself."""
    MEMORY_DIR = "TRIREME_MEMORY_DIR"
    """Folder in memory that outlives a rank, not the pod: where `checkpoint.memory` keeps shards."""
    FAILURES = "TRIREME_FAILURES"
    """JSON {count, seconds}: failures of this job so far and how long it has run, for `checkpoint.everySteps: auto`."""
    RESUME_MEMORY = "TRIREME_RESUME_MEMORY"
    """JSON {step, path}: the newest set of shards that the pods reported in memory; ranks verify and decide."""
    HEARTBEAT_DIR = "TRIREME_HEARTBEAT_DIR"
    STOP_FILE = "TRIREME_STOP_FILE"
    """When this file exists, ranks agree on a step, save, and exit 75 (same meaning as SIGTERM)."""
    JOB = "TRIREME_JOB"
    JOB_UID = "TRIREME_JOB_UID"
    """Owner of the checkpoint directory: only the newest attempt of one owner may commit. Left out: the job's name."""
    NAMESPACE = "TRIREME_NAMESPACE"
    POD = "TRIREME_POD"
    POD_UID = "TRIREME_POD_UID"
    NODE = "TRIREME_NODE"
    COORDINATOR = "TRIREME_COORDINATOR"
    """Base URL, e.g. https://10.96.0.20:8443"""
    COORDINATOR_CA = "TRIREME_COORDINATOR_CA"
    """Path of the CA file, or the PEM text itself."""
    TOKEN_FILE = "TRIREME_TOKEN_FILE"
    PROCS_PER_NODE = "TRIREME_PROCS_PER_NODE"
    CPU_WATTS_PER_CORE = "TRIREME_CPU_WATTS_PER_CORE"
    DRAM_WATTS_PER_GIGABYTE = "TRIREME_DRAM_WATTS_PER_GIGABYTE"
    GPU_WATTS = "TRIREME_GPU_WATTS"
    POWERCAP = "TRIREME_POWERCAP"
    """Folder of the RAPL counters, where the container runtime hides those of /sys."""
    METRICS_PORT = "TRIREME_METRICS_PORT"
    """Of the trainer (its first local rank)."""
    PVC_ROOT = "TRIREME_PVC_ROOT"
    LOG_DIR = "TRIREME_LOG_DIR"
    LOG_FORMAT = "TRIREME_LOG_FORMAT"
    AGENT_METRICS_PORT = "TRIREME_AGENT_METRICS_PORT"
    """0: any free port; `off`: no endpoint."""
    AGENT_PATIENCE_SECONDS = "TRIREME_AGENT_PATIENCE_SECONDS"
    """After a failure the agent waits for the coordinator's decision; with nobody to ask for so long it exits."""
    AGENT_REPORT_SECONDS = "TRIREME_AGENT_REPORT_SECONDS"
    """How often the pod that holds global rank 0 tells its progress; events are told at once."""
    AGENT_WARM_START = "TRIREME_AGENT_WARM_START"
    """1: keep a process per rank with the trainer imported, for faster restarts."""
    TERMINATION_LOG = "TRIREME_TERMINATION_LOG"
    COMPILE_BACKEND = "TRIREME_COMPILE_BACKEND"
    """torch.compile's backend where the recipe says compile: inductor (default) | aot_eager | eager"""
    INIT_TIMEOUT = "TRIREME_INIT_TIMEOUT"
    """Seconds a collective may take until the first step of an attempt is done."""
    STEP_TIMEOUT = "TRIREME_STEP_TIMEOUT"
    """Seconds a collective may take afterwards."""
    HANG_POLICY = "TRIREME_HANG_POLICY"
    """The job's `spec.hangPolicy` as JSON text: what the trainer's own hang watch goes by."""


RESERVED_ENV_PREFIXES = ("TRIREME_",)
RESERVED_ENV = frozenset(
    {Env.RANK, Env.LOCAL_RANK, Env.WORLD_SIZE, Env.LOCAL_WORLD_SIZE, Env.GROUP_RANK, Env.MASTER_ADDR, Env.MASTER_PORT}
)


class ExitCode(IntEnum):
    """How a rank ends (design §4); anything else is a crash, classified by signal and logs."""

    DONE = 0
    BAD_RECIPE = 64
    BAD_DATA = 65
    NON_FINITE = 70
    HANG = 71
    CHECKPOINT_IO = 74
    SAVED_AND_STOPPED = 75
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127


class Cause(str, Enum):
    """Why a rank, pod or gang failed; each has its own restart budget."""

    USER_ERROR = "user-error"
    OOM = "oom"
    INFRASTRUCTURE = "infrastructure"
    NETWORK = "network"
    HANG = "hang"
    PREEMPTION = "preemption"
    NON_FINITE = "non-finite"
    DATA = "data"
    UNKNOWN = "unknown"


def cause_of_exit(code: int) -> Optional[Cause]:
    """What an exit code alone tells: None for success and for saved-and-stopped. Negative codes are signals."""
    if code in (ExitCode.DONE, ExitCode.SAVED_AND_STOPPED):
        return None
    if code in (ExitCode.BAD_RECIPE, ExitCode.NOT_EXECUTABLE, ExitCode.NOT_FOUND):
        return Cause.USER_ERROR
    if code == ExitCode.BAD_DATA:
        return Cause.DATA
    if code == ExitCode.NON_FINITE:
        return Cause.NON_FINITE
    if code == ExitCode.HANG:
        return Cause.HANG
    if code == ExitCode.CHECKPOINT_IO:
        return Cause.INFRASTRUCTURE
    return Cause.UNKNOWN


def retryable(cause: Cause) -> bool:
    """Whether trying again can help: a wrong recipe or wrong data will not mend itself."""
    return cause not in (Cause.USER_ERROR, Cause.DATA)


class AgentState(str, Enum):
    WAITING = "waiting"
    """Holds the assignment, no rank runs: at the barrier."""
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    """All local ranks of this attempt have ended."""


class Action(str, Enum):
    """Within one attempt the order is hold, run, save-and-hold, save-and-stop, stop, and never back: an agent ignores
    an action that comes before the one it holds, so answers that overtake each other do no harm. Going back takes a new
    attempt."""

    RUN = "run"
    HOLD = "hold"
    """Stop any rank of an older attempt, then wait at the barrier."""
    SAVE_AND_HOLD = "save-and-hold"
    """Ranks save and exit 75, the agent stays for the next attempt: the gang is about to change its size."""
    SAVE_AND_STOP = "save-and-stop"
    STOP = "stop"
    """Kill the ranks and exit."""


def master_port(attempt: int) -> int:
    """The rendezvous port changes with the attempt, so that a late rank of an old one finds nobody."""
    return MASTER_PORT_BASE + attempt % MASTER_PORT_SPAN


# --- up: what the agent reports -------------------------------------------------------------------------------------


@dataclass
class RankReport(Message):
    local_rank: int
    pid: Optional[int] = None
    exit: Optional[int] = None
    """Exit code once ended; negative = signal number."""
    step: Optional[int] = None
    phase: Optional[str] = None
    heartbeat_age: Optional[float] = None
    """Seconds since the rank's heartbeat file last changed, by the agent's monotonic clock."""
    step_seconds: Optional[float] = None
    """Median seconds per step, by the agent's clock; absent until a few steps of this attempt were seen."""
    own_seconds: Optional[float] = None
    """What the rank itself spends on a step, waiting for its peers left out; a moving average."""


@dataclass
class Progress(Message):
    """What the first local rank that knows reports; the coordinator takes global rank 0's pod."""

    step: int
    total_steps: Optional[int] = None
    tokens: Optional[int] = None
    loss: Optional[float] = None
    tokens_per_second: Optional[float] = None
    tflops: Optional[float] = None
    """Model TFLOP/s per device (causal-exact, real tokens)."""
    mfu: Optional[float] = None
    """0..1, absent where the device's peak is not known."""
    grad_norm: Optional[float] = None
    learning_rate: Optional[float] = None
    skipped_steps: Optional[int] = None
    """By this attempt: not finite, overflowed in fp16, or spikes that stability.onSpike does not train on."""
    spikes: Optional[int] = None
    """Loss spikes seen by this attempt."""
    rollbacks: Optional[int] = None
    """Of the whole run: how often training went back in place."""
    loss_scale: Optional[float] = None
    """fp16 only."""


@dataclass
class CheckpointRef(Message):
    step: int
    path: str


@dataclass
class FailureCount(Message):
    """What a job has been through so far."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class Failure(Message):
    cause: Cause
    message: str
    rank: Optional[int] = None
    """Global rank of the first failure on this pod."""
    exit: Optional[int] = None
    traceback: Optional[str] = None
    at: Optional[float] = None
    """Unix seconds by the pod's clock: orders failures inside one pod only."""
    cascade: bool = False
    """True: this rank failed because a peer did (connection closed, collective timed out); look for an earlier one."""
    missing: Optional[List[int]] = None
    """After a hang: the global ranks that the others wait for, where that could be told."""


@dataclass
class PhaseTime(Message):
    """Unix seconds at which the newest attempt on this pod reached each phase; the parts of recovery time."""

    assigned: Optional[float] = None
    stopped: Optional[float] = None
    started: Optional[float] = None
    rendezvous: Optional[float] = None
    initialised: Optional[float] = None
    """The model stands on the device, its weights not yet loaded."""
    loaded: Optional[float] = None
    first_step: Optional[float] = None


@dataclass
class RankStack(Message):
    """What a rank was found doing."""

    local_rank: int
    state: str
    """running | sleeping | uninterruptible | stopped | traced | zombie | gone; the kernel's word for the process."""
    how: str
    """faulthandler | py-spy | proc: what took the stack; none: there is no stack."""
    waits: Optional[bool] = None
    """Whether its main thread waits for its peers; absent where the stack does not tell."""
    where: str = ""
    """Innermost frames of the main thread, one line."""


@dataclass
class Stacks(Message):
    """The stacks of a pod's ranks, saved."""

    path: str
    """Folder, as `pvc://claim/…` where it is on a claim."""
    ranks: List[RankStack] = field(default_factory=list)


@dataclass
class Report(Message):
    pod_uid: str
    attempt: int
    """The attempt the agent holds; 0 before the first assignment."""
    state: AgentState
    version: int = PROTOCOL_VERSION
    holding: Optional[str] = None
    """Tag of the newest assignment received; a long poll is answered at once while the current one has another."""
    ranks: List[RankReport] = field(default_factory=list)
    progress: Optional[Progress] = None
    checkpoint: Optional[CheckpointRef] = None
    memory: List[MemoryShards] = field(default_factory=list)
    """Checkpoint shards that this pod held in memory when it came to the barrier of this attempt, newest first."""
    energy: Dict[str, EnergyReading] = field(default_factory=dict)
    """By component: gpu, cpu, dram."""
    hardware: Optional[Hardware] = None
    failure: Optional[Failure] = None
    phases: Optional[PhaseTime] = None
    stacks: Optional[Stacks] = None
    """Taken in this attempt, because the assignment asked for it or a rank reported a hang."""
    spent: Optional[Spent] = None
    """Of the first local rank that tells."""
    before: Optional[Reached] = None
    """Of the newest attempt before this one whose ranks told their steps: they may have finished one after the last
    report of it."""


# --- down: what the coordinator assigns -----------------------------------------------------------------------------


@dataclass
class Assignment(Message):
    attempt: int
    action: Action
    node_rank: int = 0
    world_size: int = 1
    """Nodes (pods) in the gang; ranks = world_size × procs per node."""
    procs_per_node: int = 1
    master_address: str = ""
    master_port: int = 0
    resume: Optional[CheckpointRef] = None
    memory: Optional[CheckpointRef] = None
    """The newest set of shards that the pods together hold in memory, when it is as new as `resume` or newer."""
    failures: Optional[FailureCount] = None
    """Before this attempt."""
    grace_seconds: float = 60.0
    """How long ranks may take to save and stop before they are killed."""
    spare: bool = False
    """This pod has no ranks in this attempt: it holds itself ready for the next."""
    dump: Optional[bool] = None
    """True: save the stacks of all ranks, report where, and go on as `action` says."""

    @property
    def tag(self) -> str:
        """Equal exactly for equal assignments; what Report.holding says."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
