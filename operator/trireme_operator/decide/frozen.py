"""Which spec counts: what pods are made of is frozen at admission; policies and the number of nodes may change."""

from __future__ import annotations

from typing import Any

from trireme_api.job import TrainingJobSpec
from trireme_api.recipe import Recipe
from trireme_api.replicas import Replicas

from trireme_operator.decide.views import Job

FROZEN = ("recipe", "procs_per_node", "checkpoint", "template", "scheduling_policy")
"""Fields that pods are made from; the others are read live."""


def snapshot(spec: TrainingJobSpec) -> dict[str, Any]:
    """The spec as status keeps it while the gang is admitted; with defaults, for another version may have others."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def with_replicas(admitted: dict[str, Any], replicas: Replicas) -> dict[str, Any]:
    """The admitted spec with the number of nodes that counts now."""
    return {**admitted, "replicas": replicas.model_dump(mode="json", by_alias=True, exclude_none=True)}


def effective(job: Job) -> TrainingJobSpec | None:
    """The spec to act on: the admitted gang's frozen part with the live policies; None when none is valid."""
    admitted = job.admitted
    if admitted is None:
        return job.spec
    if job.spec is None:
        return admitted
    kept = {name: getattr(admitted, name) for name in FROZEN}
    return job.spec.model_copy(update={**kept, "recipe": _with_arrived(admitted, job.spec)})


def _with_arrived(admitted: TrainingJobSpec, live: TrainingJobSpec) -> Recipe | None:
    """The admitted recipe with the number of mega-batches that have arrived by now, which no pod is made from."""
    recipe = admitted.recipe
    if recipe is None or recipe.anytime is None or live.recipe is None or live.recipe.anytime is None:
        return recipe
    arrived = min(live.recipe.anytime.arrived, recipe.anytime.mega_batches)
    return recipe.model_copy(update={"anytime": recipe.anytime.model_copy(update={"arrived": arrived})})


def ignored_edits(job: Job) -> list[str]:
    """Frozen fields (as in YAML) whose live value differs from the admitted one."""
    admitted = job.admitted
    if admitted is None or job.spec is None:
        return []
    alias = {name: field.alias or name for name, field in TrainingJobSpec.model_fields.items()}
    frozen = admitted.model_copy(update={"recipe": _with_arrived(admitted, job.spec)})
    return [f"spec.{alias[name]}" for name in FROZEN if getattr(frozen, name) != getattr(job.spec, name)]
