"""Where things lie in a training pod, and which claims a job needs. The operator builds pods by it, validation too."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trireme_api.families import resolve
from trireme_api.families.memory import checkpoint_bytes
from trireme_api.job import TrainingJobSpec
from trireme_api.quantity import parse_quantity

AGENT_DIR = "/trireme"
AGENT_FILE = f"{AGENT_DIR}/agent.pyz"
RUN_DIR = "/run/trireme"
"""Heartbeats and the stop file; memory-backed."""
LOG_DIR = "/var/log/trireme"
MEMORY_DIR = "/run/trireme-memory"
"""Shards of the tier in memory; outlives the ranks."""
TOKEN_DIR = "/var/run/secrets/trireme"
POWERCAP_DIR = "/mnt/powercap"
"""The node's energy counters, where the installation has them mounted."""
RESERVED_MOUNTS = (
    AGENT_DIR, RUN_DIR, MEMORY_DIR, LOG_DIR, TOKEN_DIR, POWERCAP_DIR, "/mnt/pvc", "/dev", "/tmp", "/proc", "/sys",
)  # fmt: skip

PVC_SCHEME = "pvc://"
_CLAIM = re.compile(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")


def claim_of(path: str) -> str | None:
    """The claim of `pvc://claim/dir`; None for any other path. Raises ValueError when claim or path is malformed."""
    if not path.startswith(PVC_SCHEME):
        return None
    claim, _, rest = path.removeprefix(PVC_SCHEME).partition("/")
    if not _CLAIM.match(claim):
        raise ValueError(f"{path!r} names no PersistentVolumeClaim; write pvc://CLAIM/DIRECTORY")
    if ".." in rest.split("/"):
        raise ValueError(f"{path!r} leaves the claim; remove '..'")
    return claim


def job_paths(spec: TrainingJobSpec) -> Iterator[tuple[str, str, bool]]:
    """Every storage path of the job as (field, path, written to)."""
    if spec.recipe is not None:
        for i, source in enumerate(spec.recipe.data.sources):
            yield f"spec.recipe.data.sources[{i}].path", source.path, False
        for field, path in spec.recipe.evaluation.paths() if spec.recipe.evaluation else ():
            yield f"spec.recipe.evaluation.{field}", path, False
    if spec.checkpoint is not None:
        yield "spec.checkpoint.uri", spec.checkpoint.uri, True


def claims(spec: TrainingJobSpec) -> dict[str, bool]:
    """Claims mounted under /mnt/pvc by name; the value says whether any path in it is written to."""
    found: dict[str, bool] = {}
    for _, path, written in job_paths(spec):
        claim = claim_of(path)
        if claim is not None:
            found[claim] = found.get(claim, False) or written
    return found


def claim_fields(spec: TrainingJobSpec) -> dict[str, str]:
    """Every claim the job needs, template volumes included, with the field that names it."""
    found: dict[str, str] = {}
    for field, path, _ in job_paths(spec):
        claim = claim_of(path)
        if claim is not None:
            found.setdefault(claim, field)
    for i, volume in enumerate(spec.template.volumes):
        if volume.persistent_volume_claim is not None:
            found.setdefault(
                volume.persistent_volume_claim.claim_name, f"spec.template.volumes[{i}].persistentVolumeClaim"
            )
    return found


def gpus(spec: TrainingJobSpec) -> int:
    """GPUs of one pod: the extended resources `vendor/gpu` of its limits (requests where there is no limit)."""
    wanted = {**spec.template.resources.requests, **spec.template.resources.limits}
    return sum(int(parse_quantity(value)) for name, value in wanted.items() if name.endswith("/gpu"))


def procs_per_node(spec: TrainingJobSpec) -> int:
    """Ranks per pod: as said, or one per GPU, or one."""
    return spec.procs_per_node if isinstance(spec.procs_per_node, int) else max(1, gpus(spec))


def memory_limit(spec: TrainingJobSpec) -> str | None:
    """Size limit of the memory that a pod's shards may take, as a quantity; None: the job keeps none there.

    Left out by the user: twice (the set in force and the one being written) this node's share of the state, for its own
    shards and each copy it keeps for other nodes, with a tenth and 64 MiB to spare.
    """
    memory = spec.checkpoint.memory if spec.checkpoint is not None else None
    if memory is None or spec.recipe is None:
        return None
    if memory.size is not None:
        return memory.size
    # At the smallest size the gang may have: a pod's volumes do not change while it lives.
    nodes, ranks = spec.replicas.least, procs_per_node(spec)
    plan = spec.recipe.parallelism
    shard_ranks = (plan.shard_size or ranks) if plan.shard == "hybrid" else nodes * ranks
    total = checkpoint_bytes(resolve(spec.recipe.model))
    held = total * ranks / shard_ranks * (1 + min(memory.replicas, spec.replicas.desired - 1))
    return f"{int(held * 2 * 1.1 / 2**20) + 64}Mi"
