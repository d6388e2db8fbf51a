"""What a rank is told through its environment (protocol.Env). No torch: a bad recipe is refused before it loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from trireme_api.hang import HangPolicy
from trireme_api.protocol import CheckpointRef, Env, FailureCount
from trireme_api.recipe import CheckpointSpec, Recipe
from trireme_api.schema import problems

from trireme_trainer.lifecycle.outcome import BadRecipe

COMPILE_BACKENDS = ("inductor", "aot_eager", "eager")

SpecT = TypeVar("SpecT", bound=BaseModel)


@dataclass(frozen=True)
class Settings:
    recipe: Recipe
    checkpoint: CheckpointSpec | None
    """None: nothing is saved."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    attempt: int = 0
    heartbeat_dir: Path | None = None
    stop_file: Path | None = None
    metrics_port: int | None = None
    log_dir: Path | None = None
    """Where the step log goes when there is no checkpoint directory to put it beside."""
    job: str = ""
    namespace: str = ""
    resume: CheckpointRef | None = None
    """The newest checkpoint announced so far: finding none at all where there was one means a wrong volume."""
    memory_dir: Path | None = None
    """Where shards are kept in memory; None: `checkpoint.memory` cannot be honoured here."""
    resume_memory: CheckpointRef | None = None
    """The set in memory that the control plane saw whole; ranks look themselves."""
    failures: FailureCount = field(default_factory=FailureCount)
    """Of this job before this attempt."""
    owner: str = ""
    """Whose attempts `attempt` counts: the job's UID."""
    compile_backend: str = "inductor"
    init_timeout: float = 300.0
    """Seconds a collective may take until the first step is done: peers may still be importing or compiling."""
    step_timeout: float = 120.0
    """Seconds a collective may take afterwards."""
    hang_policy: HangPolicy = field(default_factory=HangPolicy)

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Raises BadRecipe naming the variable and field."""
        text = env.get(Env.RECIPE)
        if not text:
            raise BadRecipe(f"{Env.RECIPE}: is required; the recipe as JSON, or the path of a JSON or YAML file")
        recipe = _spec(Recipe, _document(text, Env.RECIPE), Env.RECIPE)
        text = env.get(Env.CHECKPOINT)
        checkpoint = _spec(CheckpointSpec, _document(text, Env.CHECKPOINT), Env.CHECKPOINT) if text else None
        text = env.get(Env.HANG_POLICY)
        hang_policy = _spec(HangPolicy, _document(text, Env.HANG_POLICY), Env.HANG_POLICY) if text else HangPolicy()
        world_size = _integer(env, Env.WORLD_SIZE, 1, least=1)
        settings = cls(
            recipe=recipe,
            checkpoint=checkpoint,
            rank=_integer(env, Env.RANK, 0),
            local_rank=_integer(env, Env.LOCAL_RANK, 0),
            world_size=world_size,
            local_world_size=_integer(env, Env.LOCAL_WORLD_SIZE, 1, least=1),
            attempt=_integer(env, Env.ATTEMPT, 0),
            heartbeat_dir=_path(env, Env.HEARTBEAT_DIR),
            stop_file=_path(env, Env.STOP_FILE),
            metrics_port=_integer(env, Env.METRICS_PORT, 0) or None,
            log_dir=_path(env, Env.LOG_DIR),
            job=env.get(Env.JOB, ""),
            namespace=env.get(Env.NAMESPACE, ""),
            resume=_announced(env.get(Env.RESUME)),
            memory_dir=_path(env, Env.MEMORY_DIR),
            resume_memory=_announced(env.get(Env.RESUME_MEMORY), Env.RESUME_MEMORY),
            failures=_failures(env.get(Env.FAILURES)),
            owner=env.get(Env.JOB_UID) or "/".join(filter(None, (env.get(Env.NAMESPACE), env.get(Env.JOB)))),
            compile_backend=env.get(Env.COMPILE_BACKEND, "inductor"),
            init_timeout=_seconds(env, Env.INIT_TIMEOUT, cls.init_timeout),
            step_timeout=_seconds(env, Env.STEP_TIMEOUT, cls.step_timeout),
            hang_policy=hang_policy,
        )
        if settings.rank >= world_size:
            raise BadRecipe(f"{Env.RANK}: must be below {Env.WORLD_SIZE} = {world_size}, got {settings.rank}")
        if world_size > 1 and not (env.get(Env.MASTER_ADDR) and env.get(Env.MASTER_PORT)):
            raise BadRecipe(f"{Env.MASTER_ADDR} and {Env.MASTER_PORT}: are required when {Env.WORLD_SIZE} is above 1")
        if settings.compile_backend not in COMPILE_BACKENDS:
            known = ", ".join(COMPILE_BACKENDS)
            raise BadRecipe(f"{Env.COMPILE_BACKEND}: must be one of {known}, got {settings.compile_backend!r}")
        return settings


def _document(text: str, name: str) -> Any:
    """JSON text, or the content of the JSON or YAML file that it names."""
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise BadRecipe(f"{name}: cannot read {text!r}: {error.strerror}") from None
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadRecipe(f"{name}: neither JSON nor YAML: {' '.join(str(error).split())}") from None


def _spec(kind: type[SpecT], data: Any, name: str) -> SpecT:
    if not isinstance(data, dict):
        raise BadRecipe(f"{name}: expected an object with fields, got {type(data).__name__}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        known = [field.alias or key for key, field in kind.model_fields.items()]
        raise BadRecipe(f"{name}: " + "; ".join(str(problem) for problem in problems(error, known))) from None


def _integer(env: Mapping[str, str], name: str, default: int, *, least: int = 0) -> int:
    text = env.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise BadRecipe(f"{name}: must be a whole number of at least {least}, got {text!r}")
    return value


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise BadRecipe(f"{name}: must be seconds above 0, got {text!r}")
    return value


def _announced(text: str | None, name: str = Env.RESUME) -> CheckpointRef | None:
    try:
        return CheckpointRef.from_json(json.loads(text)) if text else None
    except ValueError as error:
        raise BadRecipe(f"{name}: must be JSON with step and path: {error}") from None


def _failures(text: str | None) -> FailureCount:
    try:
        return FailureCount.from_json(json.loads(text)) if text else FailureCount()
    except ValueError as error:
        raise BadRecipe(f"{Env.FAILURES}: must be JSON with count and seconds: {error}") from None


def _path(env: Mapping[str, str], name: str) -> Path | None:
    return Path(env[name]) if env.get(name) else None
