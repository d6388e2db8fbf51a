"""The rank contract: the environment each rank is started with."""

from __future__ import annotations

import json
import os
from typing import Dict, Mapping

from trireme_api.protocol import Assignment, Env

AGENT_ONLY = frozenset(
    {
        Env.COORDINATOR,
        Env.COORDINATOR_CA,
        Env.TOKEN_FILE,
        Env.AGENT_METRICS_PORT,
        Env.AGENT_PATIENCE_SECONDS,
        Env.AGENT_REPORT_SECONDS,
        Env.AGENT_WARM_START,
        Env.TERMINATION_LOG,
    }
)
"""How to speak to the coordinator is none of a rank's business."""


def global_rank(assignment: Assignment, local_rank: int) -> int:
    return assignment.node_rank * assignment.procs_per_node + local_rank


def base_environment(inherited: Mapping[str, str], ranks_here: int) -> Dict[str, str]:
    """What does not depend on the attempt; a process started early (warm start) gets just this."""
    env = {name: value for name, value in inherited.items() if name not in AGENT_ONLY}
    env.setdefault("PYTHONUNBUFFERED", "1")
    # A crash in native code then leaves a Python traceback in the log, too.
    env.setdefault("PYTHONFAULTHANDLER", "1")
    if ranks_here > 1:
        # As torchrun: without it every rank starts one thread per core.
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks_here)))
    return env


def rank_environment(
    inherited: Mapping[str, str], assignment: Assignment, local_rank: int, *, heartbeat_dir: str, stop_file: str,
    error_file: str, log_dir: str,
) -> Dict[str, str]:
    """The full environment of one rank: what the pod has, the `env://` names, the TRIREME_* names."""
    env = base_environment(inherited, assignment.procs_per_node)
    per_node, nodes = assignment.procs_per_node, assignment.world_size
    rank, world = global_rank(assignment, local_rank), nodes * per_node
    env.update(
        {
            Env.RANK: str(rank),
            Env.LOCAL_RANK: str(local_rank),
            Env.WORLD_SIZE: str(world),
            Env.LOCAL_WORLD_SIZE: str(per_node),
            Env.GROUP_RANK: str(assignment.node_rank),
            Env.MASTER_ADDR: assignment.master_address,
            Env.MASTER_PORT: str(assignment.master_port),
            Env.ATTEMPT: str(assignment.attempt),
            Env.HEARTBEAT_DIR: heartbeat_dir,
            Env.STOP_FILE: stop_file,
            Env.LOG_DIR: log_dir,
            # What torchrun sets beside these; libraries look for them to know they were launched.
            "GROUP_WORLD_SIZE": str(nodes),
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": str(world),
            "TORCHELASTIC_RESTART_COUNT": str(max(0, assignment.attempt - 1)),
            "TORCHELASTIC_RUN_ID": inherited.get(Env.JOB, "trireme"),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCHELASTIC_ERROR_FILE": error_file,
        }
    )
    told = assignment
    for name, message in (
        (Env.RESUME, told.resume), (Env.RESUME_MEMORY, told.memory), (Env.FAILURES, told.failures),
    ):  # fmt: skip
        env.pop(name, None)
        if message is not None:
            env[name] = json.dumps(message.to_json())
    return env


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
