"""`trireme run`: from a recipe (or a TrainingJob) and options to the environment of an agent on this machine."""

from __future__ import annotations

import json
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trireme_api.families import check_recipe
from trireme_api.job import CarbonPolicy, parse_spec
from trireme_api.protocol import Env
from trireme_api.recipe import CheckpointSpec, Recipe
from trireme_api.schema import InvalidSpec, Spec

from trireme_cli import documents
from trireme_cli.local_data import look, look_at_checkpoint

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Options:
    nproc: int
    checkpoint: str | None = None
    every: int | None = None
    keep: int | None = None
    data_root: Path | None = None
    claims: Mapping[str, Path] | None = None
    directory: Path | None = None
    warm: bool = False
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Plan:
    name: str
    command: list[str]
    """Of every rank; empty: the trainer."""
    directory: Path
    environment: dict[str, str]
    scratch: tempfile.TemporaryDirectory[str]
    """Heartbeats, token and claims; gone with the run."""
    recipe: Recipe | None = None
    checkpoint: CheckpointSpec | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What a later report is to know of it."""
        recipe = json.loads(_json(self.recipe)) if self.recipe is not None else None
        uri = self.checkpoint.uri if self.checkpoint is not None else None
        nproc = int(self.environment[Env.PROCS_PER_NODE])
        return {"name": self.name, "nproc": nproc, "command": self.command, "checkpoint": uri, "recipe": recipe}


def plan_recipe(path: Path, options: Options, inherited: Mapping[str, str]) -> Plan:
    """Raises InvalidSpec naming the field or option."""
    recipe, checkpoint = read_recipe(path)
    recipe.parallelism.check_ranks(options.nproc)
    check_recipe(recipe)
    name = _job_name(path.stem)
    directory = (options.directory or Path("trireme-run") / name).absolute()
    claims = dict(options.claims or {})
    recipe = _local_paths(recipe, options.data_root, claims)
    look(recipe, claims, here=True)
    checkpoint = _checkpoint(checkpoint, options, directory, claims)
    look_at_checkpoint(recipe, checkpoint.uri, claims)
    plan = _plan(name, [], directory, options, inherited, recipe, checkpoint)
    plan.environment[Env.RECIPE] = _json(recipe)
    plan.environment[Env.CHECKPOINT] = _json(checkpoint)
    return plan


def plan_command(command: list[str], options: Options, inherited: Mapping[str, str]) -> Plan:
    """An own script: everything after `--`."""
    name = _job_name(next((Path(part).stem for part in command if part.endswith(".py")), Path(command[0]).name))
    directory = (options.directory or Path("trireme-run") / name).absolute()
    checkpoint = _checkpoint(None, options, directory, dict(options.claims or {})) if options.checkpoint else None
    plan = _plan(name, command, directory, options, inherited, None, checkpoint)
    if checkpoint is not None:
        plan.environment[Env.CHECKPOINT] = _json(checkpoint)
    return plan


def read_recipe(path: Path) -> tuple[Recipe, CheckpointSpec | None]:
    """A recipe by itself, or the recipe and checkpoint of a TrainingJob. Raises InvalidSpec, OSError."""
    document = documents.the_one(path)
    with documents.named(path):
        if documents.is_recipe(document):
            return documents.parse_recipe(document), None
        spec = parse_spec(document.get("spec"))
    if spec.recipe is None:
        raise InvalidSpec("spec.recipe", "is not given; run your own script with `trireme run -- COMMAND`")
    return spec.recipe, spec.checkpoint


def lacking(plan: Plan, step: int) -> str:
    """The directory of a mega-batch that training cannot go on without after `step` steps; empty where all are there.

    A directory counts when its manifest is there, which `trireme prepare` writes last. Raises StorageError."""
    from trireme_trainer.data.manifest import MANIFEST
    from trireme_trainer.storage import open_filesystem

    recipe = plan.recipe
    assert recipe is not None
    assert recipe.stream is not None
    for source in recipe.of_session(recipe.stream.at(step)).data.sources:
        path = source.path
        if path.startswith("pvc://"):
            path = str(Path(plan.environment[Env.PVC_ROOT]) / path.removeprefix("pvc://"))
        filesystem, place = open_filesystem(path)
        if not filesystem.exists(f"{place.rstrip('/')}/{MANIFEST}"):
            return source.path
    return ""


def next_attempt(directory: Path) -> tuple[str, int]:
    """(owner, attempt) for this run. Raises OSError.

    Attempts of one directory only rise, over many runs: so the step log's newest row of a step is known, and of two
    runs in one directory only the later can commit checkpoints.
    """
    path = directory / "run.json"
    owner, attempt = uuid.uuid4().hex, 0
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        owner, attempt = str(data["owner"]), int(data["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    note_attempt(directory, owner, attempt + 1)
    return owner, attempt + 1


def note_attempt(directory: Path, owner: str, attempt: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / "run.json.tmp"
    temporary.write_text(json.dumps({"owner": owner, "attempt": attempt}) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "run.json")


def _plan(
    name: str, command: list[str], directory: Path, options: Options, inherited: Mapping[str, str],
    recipe: Recipe | None, checkpoint: CheckpointSpec | None,
) -> Plan:  # fmt: skip
    scratch = tempfile.TemporaryDirectory(prefix="trireme-run-")
    pvc_root = Path(scratch.name) / "pvc"
    pvc_root.mkdir()
    for claim, folder in (options.claims or {}).items():
        (pvc_root / claim).symlink_to(folder.absolute())
    environment = {key: value for key, value in inherited.items() if not key.startswith("TRIREME_")}
    watts = CarbonPolicy().cpu_watts_per_core
    environment |= {
        Env.CPU_WATTS_PER_CORE: inherited.get(Env.CPU_WATTS_PER_CORE, f"{watts:g}"),
        Env.JOB: name,
        Env.NAMESPACE: "local",
        Env.POD: f"{name}-0-0",
        Env.POD_UID: uuid.uuid4().hex,
        Env.NODE: "local",
        Env.PROCS_PER_NODE: str(options.nproc),
        Env.HEARTBEAT_DIR: str(Path(scratch.name) / "run"),
        Env.MEMORY_DIR: str(Path(scratch.name) / "memory"),
        Env.LOG_DIR: str(directory / "logs"),
        Env.PVC_ROOT: str(pvc_root),
        Env.TERMINATION_LOG: str(Path(scratch.name) / "termination-log"),
        Env.AGENT_METRICS_PORT: "off",
        Env.AGENT_REPORT_SECONDS: "0.5",
    }
    # Memory in use is that of the whole session here: not declared unless asked for.
    environment |= {name: inherited[name] for name in (Env.DRAM_WATTS_PER_GIGABYTE, Env.GPU_WATTS) if name in inherited}
    if options.warm:
        environment[Env.AGENT_WARM_START] = "1"
    return Plan(name, command, directory, environment, scratch, recipe, checkpoint)


def _local_paths(recipe: Recipe, root: Path | None, claims: Mapping[str, Path]) -> Recipe:
    sources = []
    for i, source in enumerate(recipe.data.sources):
        where = _absolute(source.path, f"data.sources[{i}].path", root or Path(), claims)
        sources.append(source.model_copy(update={"path": where}))
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update={"sources": sources})}
    if (spec := recipe.evaluation) is not None:
        here = [_absolute(path, f"evaluation.{field}", root or Path(), claims) for field, path in spec.paths()]
        count = len(spec.sources)
        texts = [s.model_copy(update={"path": p}) for s, p in zip(spec.sources, here[:count], strict=True)]
        changes["evaluation"] = spec.model_copy(update={"sources": texts, "tasks": here[count:]})
    return recipe.model_copy(update=changes)


def _checkpoint(
    given: CheckpointSpec | None, options: Options, directory: Path, claims: Mapping[str, Path]
) -> CheckpointSpec:
    if options.checkpoint is not None:
        uri = _absolute(options.checkpoint, "--checkpoint", Path(), claims)
    elif given is not None:
        uri = _absolute(given.uri, "checkpoint.uri", Path(), claims)
    else:
        uri = str(directory / "checkpoints")
    changes: dict[str, Any] = {"uri": uri}
    if options.every is not None:
        changes["every_steps"] = options.every
    if options.keep is not None:
        changes["keep"] = options.keep
    return given.model_copy(update=changes) if given is not None else CheckpointSpec(**changes)


def _absolute(path: str, field: str, root: Path, claims: Mapping[str, Path]) -> str:
    if path.startswith("pvc://"):
        claim = path.removeprefix("pvc://").partition("/")[0]
        if claim not in claims:
            raise InvalidSpec(field, f"{path} lies on claim {claim!r}; say where that is here: --pvc {claim}=DIR")
        return path
    return path if _URL.match(path) else str((root / Path(path).expanduser()).absolute())


def _job_name(text: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:52] or "run"


def _json(spec: Spec) -> str:
    return json.dumps(spec.model_dump(mode="json", by_alias=True, exclude_none=True), separators=(",", ":"))
