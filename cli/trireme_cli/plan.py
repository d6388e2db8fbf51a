"""`trireme plan`: memory, time, energy, carbon and failures of a run, before anything is spent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from pydantic.alias_generators import to_camel
from trireme_api import carbon
from trireme_api.carbon.policy import CarbonPolicy
from trireme_api.devices import BOARDS, Board
from trireme_api.layout import gpus as gpus_of
from trireme_api.layout import procs_per_node
from trireme_api.planning import Plan, Setting, make
from trireme_api.planning.costs import STORAGE
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec
from trireme_api.validation import check_job

from trireme_cli import documents
from trireme_cli.finite import FiniteRange
from trireme_cli.local_data import look
from trireme_cli.plan_text import lines

CPU = "cpu"


@dataclass(frozen=True)
class Asked:
    """What the file says."""

    recipe: Recipe
    ranks: int | None = None
    per_node: int | None = None
    policy: CarbonPolicy | None = None
    on_cpu: bool = False
    path: str = ""
    """Where the recipe stands in the file."""


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path, exists=True))
@click.option("--gpu", type=click.Choice([*BOARDS, CPU]), help="The device; left out: h100, or cpu for a job without.")
@click.option("--gpus", type=click.IntRange(1, 1_000_000), help="How many in all; left out: as the job says, or 8.")
@click.option("--tflops", type=FiniteRange(0, min_open=True), help="Measured model TFLOPS of one device.")
@click.option("--storage", type=FiniteRange(0, min_open=True), default=STORAGE / 1e9, show_default=True,
              help="GB/s of storage for each node.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    file: Path, gpu: str | None, gpus: int | None, tflops: float | None, storage: float, as_json: bool
) -> None:
    """Say what FILE, a TrainingJob or a recipe, will need and cost: memory per device for each sharding and whether it
    fits, FLOPs, traffic, time, energy, carbon, checkpoints, failures. Nothing is started, no cluster is asked.

    \b
      trireme plan job.yaml
      trireme plan recipe.yaml --gpu a100-80 --gpus 64
      trireme plan recipe.yaml --gpu cpu --gpus 2 --tflops 0.05
      trireme plan job.yaml --json

    All of it is arithmetic on published figures; each assumption is named at the end.
    """
    asked = _read(file)
    name = gpu or (CPU if asked.on_cpu else "h100")
    board = BOARDS.get(name)
    setting = _setting(asked, board, gpus)
    try:
        found = make(setting, tflops=tflops, storage=storage * 1e9, policy=asked.policy)
    except carbon.UnknownZone as error:
        raise InvalidSpec("spec.carbonPolicy.zone", str(error)) from None
    if gpu is None and board is not None:
        found = replace(found, assumptions=[f"device: none is named with --gpu, so {name}", *found.assumptions])
    if as_json:
        click.echo(json.dumps(plain(found), indent=2, ensure_ascii=False))
        return
    for line in lines(found):
        click.echo(line)


def _read(file: Path) -> Asked:
    """The file's TrainingJob, or its recipe; what else stands beside a job is passed over. Raises InvalidSpec."""
    document = documents.the_one(file)
    if documents.is_recipe(document):
        with documents.named(file):
            recipe = documents.parse_recipe(document)
        look(recipe)
        return Asked(recipe)
    checked = check_job(document)
    if checked.spec is None:
        raise InvalidSpec(str(file), "; ".join(map(str, checked.problems)))
    spec = checked.spec
    if spec.recipe is None:
        raise InvalidSpec("spec.recipe", "is not given; a plan is made of a recipe, your own script has none")
    each = procs_per_node(spec)
    ranks = spec.replicas.desired * each
    return Asked(spec.recipe, ranks, each, spec.carbon_policy, gpus_of(spec) == 0, "spec.recipe.")


def _setting(asked: Asked, board: Board | None, gpus: int | None) -> Setting:
    usual = board.per_node if board else 1
    ranks = gpus or asked.ranks or usual
    per_node = asked.per_node if gpus is None and asked.per_node else usual
    return Setting.of(asked.recipe, ranks, per_node, board, asked.path)


def plain(found: Plan) -> dict[str, Any]:
    """As JSON: bytes, seconds, grams, kWh; names as in YAML."""
    setting = found.setting
    count = setting.config.parameters()
    return {
        "model": setting.recipe.model.preset,
        "parameters": {"total": count.total, "activated": count.activated},
        "sizes": [
            {"parameters": session.config.parameters().total, "steps": steps} for session, steps in setting.sessions
        ],
        "device": setting.board.name if setting.board else CPU,
        "devices": setting.ranks,
        "nodes": setting.nodes,
        "microBatches": setting.share.micro_batches,
        "microSequences": setting.micro_sequences,
        "passes": setting.passes,
        "tokens": found.tokens,
        "steps": setting.recipe.total_steps,
        "flopsPerToken": asdict(found.flops),
        "roomBytes": setting.room,
        "shardings": [
            {
                "name": row.name,
                "own": row.own,
                "fits": row.fits,
                "memoryBytes": {**asdict(row.memory), "total": row.memory.total},
                "trafficBytes": {**_camel(asdict(row.traffic)), "total": row.traffic.total},
                "speed": _camel(asdict(row.speed)) if row.speed else None,
            }
            for row in found.rows
        ],
        "wouldFit": found.remedies,
        "trainingSeconds": found.training_seconds,
        "wallSeconds": found.wall_seconds,
        "checkpoint": _camel(asdict(found.checkpoint)),
        "failures": [_camel(asdict(one)) for one in found.failures],
        "footprint": _camel(asdict(found.footprint)) if found.footprint else None,
        "assumptions": found.assumptions,
    }


def _camel(values: dict[str, Any]) -> dict[str, Any]:
    return {to_camel(name): _camel(value) if isinstance(value, dict) else value for name, value in values.items()}
