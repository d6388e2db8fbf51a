"""Everything that can be said against a TrainingJob before it costs anything: used by operator and `trireme validate`.

The CRD's schema says some of it earlier where the server enforces it; an old server (1.20) drops what it does not know,
so that nothing here may rely on the server having looked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trireme_api import carbon, families
from trireme_api.job import (
    API_VERSION,
    KIND,
    MAX_NAME_LENGTH,
    InvalidSpecs,
    TrainingJobSpec,
    field_names,
    parse_spec,
)
from trireme_api.layout import RESERVED_MOUNTS, claim_of, gpus, job_paths, procs_per_node
from trireme_api.patterns import pattern
from trireme_api.quantity import parse_quantity
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")


@dataclass(frozen=True)
class Checked:
    """A spec that may be run, or the problems that forbid it; never both."""

    spec: TrainingJobSpec | None
    problems: tuple[InvalidSpec, ...]


def check_job(manifest: dict[str, Any]) -> Checked:
    """Checks a whole TrainingJob object as it was written or as the API server returned it."""
    found = list(_head(manifest))
    spec: TrainingJobSpec | None = None
    try:
        spec = parse_spec(manifest.get("spec"))
    except InvalidSpecs as error:
        found += error.found
    if spec is not None:
        found += list(check_spec(spec))
        found += list(_dropped_by_server(manifest, spec))
    return Checked(None if found else spec, tuple(found))


def _head(manifest: dict[str, Any]) -> Iterator[InvalidSpec]:
    if manifest.get("apiVersion", API_VERSION) != API_VERSION:
        yield InvalidSpec("apiVersion", f"must be {API_VERSION} (got {manifest['apiVersion']!r})")
    if manifest.get("kind", KIND) != KIND:
        yield InvalidSpec("kind", f"must be {KIND} (got {manifest['kind']!r})")
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str):
        yield InvalidSpec("metadata.name", "is required")
    elif len(name) > MAX_NAME_LENGTH or not _NAME.match(name):
        yield InvalidSpec(
            "metadata.name",
            f"must be at most {MAX_NAME_LENGTH} lower-case letters, digits and '-', because pods are named after it"
            f" (got {name!r})",
        )


def check_spec(spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    """What the shape alone cannot say."""
    if spec.recipe is not None:
        yield from check_recipe(spec.recipe, "spec.recipe")
    yield from _paths(spec)
    yield from _resources(spec)
    yield from _sizes(spec)
    yield from _groups(spec)
    for i, mount in enumerate(spec.template.volume_mounts):
        if any(mount.mount_path == at or mount.mount_path.startswith(at + "/") for at in RESERVED_MOUNTS):
            yield InvalidSpec(
                f"spec.template.volumeMounts[{i}].mountPath",
                f"{mount.mount_path} is Trireme's or the system's; choose another",
            )
    yield from _rules(spec)
    try:
        carbon.intensity(spec.carbon_policy.zone, spec.carbon_policy.grams_per_kilowatt_hour)
    except carbon.UnknownZone as error:
        yield InvalidSpec("spec.carbonPolicy.zone", str(error))
    for field, message in spec.carbon_policy.problems(saves=spec.checkpoint is not None):
        yield InvalidSpec(f"spec.carbonPolicy.{field}", message)


def check_recipe(recipe: Recipe, where: str = "") -> Iterator[InvalidSpec]:
    """Preset, overrides and what depends on both. `where` is the path of the recipe in the user's YAML."""
    try:
        families.check_recipe(recipe, f"{where}." if where else "")
    except InvalidSpec as error:
        yield error


def _sizes(spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    """A size that does not divide the batch is fine (the trainer fills up with sequences that do not count); one with
    more ranks than the batch has sequences would only burn energy."""
    if spec.recipe is None:
        return
    try:
        ranks = procs_per_node(spec)
    except ValueError:
        return  # told with the resources
    sequences, replicas = spec.recipe.sequences_per_step, spec.replicas
    # Ranks of a tensor group read the same sequences.
    most = sequences * spec.recipe.parallelism.tensor
    sizes = [("max", replicas.max or 0), *(("allowed", nodes) for nodes in replicas.allowed)]
    for field, nodes in sizes:
        if nodes * ranks > most:
            yield InvalidSpec(
                f"spec.replicas.{field}",
                f"{nodes} nodes are {nodes * ranks} ranks, but a batch of {spec.recipe.batch.tokens} tokens has only"
                f" {sequences} sequences of {spec.recipe.data.sequence_length}; use at most {most // ranks} nodes"
                " or raise recipe.batch.tokens",
            )
            return


def _groups(spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    """At every size that the gang may have the ranks must be whole groups of `parallelism.expert` and `tensor`."""
    if spec.recipe is None:
        return
    try:
        ranks = procs_per_node(spec)
    except ValueError:
        return  # told with the resources
    replicas = spec.replicas
    sizes = replicas.allowed or range(replicas.least, replicas.desired + 1)
    for field, group in spec.recipe.parallelism.groups.items():
        wrong = [nodes for nodes in sizes if nodes * ranks % group]
        if wrong:
            step = group // math.gcd(group, ranks)
            yield InvalidSpec(
                f"spec.recipe.parallelism.{field}",
                f"{group} does not divide {wrong[0] * ranks} ranks, the gang of {wrong[0]} nodes that spec.replicas "
                f"has; set spec.replicas.allowed to multiples of {step}",
            )


def _paths(spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    mounted = [mount.mount_path for mount in spec.template.volume_mounts]
    for field, path, _ in job_paths(spec):
        try:
            claim = claim_of(path)
        except ValueError as error:
            yield InvalidSpec(field, str(error))
            continue
        if claim is None and "://" not in path and not any(path == at or path.startswith(at + "/") for at in mounted):
            yield InvalidSpec(
                field,
                f"{path!r} is on no volume of the pod; write pvc://CLAIM/DIRECTORY, a URL, or mount a volume there",
            )


def _rules(spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    rules = spec.failure_policy.rules
    for i, rule in enumerate(rules):
        where = f"spec.failurePolicy.rules[{i}]"
        if any(other.name == rule.name for other in rules[:i]):
            yield InvalidSpec(f"{where}.name", f"{rule.name!r} is taken by another rule; names are told apart by users")
        for j, text in enumerate(rule.on_log_patterns):
            try:
                pattern(text)
            except ValueError as error:
                yield InvalidSpec(f"{where}.onLogPatterns[{j}]", f"{error} (got {text!r})")


def _resources(spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    resources = spec.template.resources
    limits: dict[str, float] = {}
    for kind, amounts in (("limits", resources.limits), ("requests", resources.requests)):
        for name, value in amounts.items():
            field = f"spec.template.resources.{kind}.{name}"
            try:
                amount = parse_quantity(value)
            except ValueError as error:
                yield InvalidSpec(field, str(error))
                continue
            if amount < 0 or (name.endswith("/gpu") and amount != int(amount)):
                what = "a whole number" if amount >= 0 else "zero or more"
                yield InvalidSpec(field, f"must be {what} (got {value!r})")
            elif kind == "limits":
                limits[name] = amount
            elif name in limits and amount > limits[name]:
                yield InvalidSpec(field, f"{value!r} is more than the limit {resources.limits[name]!r}")
    try:
        have = gpus(spec)
    except ValueError:
        return
    if have and isinstance(spec.procs_per_node, int) and spec.procs_per_node > have:
        yield InvalidSpec(
            "spec.procsPerNode",
            f"{spec.procs_per_node} ranks cannot share {have} GPU(s) of the pod; use auto or at most {have}",
        )


def _dropped_by_server(manifest: dict[str, Any], spec: TrainingJobSpec) -> Iterator[InvalidSpec]:
    """Unknown fields that a server without field validation pruned, found in what `kubectl apply` remembers.

    The annotation counts only while it still describes the object: without the unknown fields it must give this spec.
    """
    annotations = (manifest.get("metadata") or {}).get("annotations") or {}
    try:
        applied = json.loads(annotations[LAST_APPLIED])["spec"]
    except (KeyError, TypeError, ValueError):
        return
    unknown: list[InvalidSpec] = []
    for _ in range(len(field_names(TrainingJobSpec))):
        try:
            same = parse_spec(applied) == spec
        except InvalidSpecs as error:
            more = [item for item in error.found if item.message.startswith("unknown field")]
            if not more or len(more) != len(error.found):
                return
            unknown += more
            for item in more:
                _remove(applied, item.field.removeprefix("spec."))
            continue
        if same:
            yield from unknown
        return


def _remove(data: Any, path: str) -> None:
    parts = re.findall(r"[^.\[\]]+", path)
    for part in parts[:-1]:
        data = data[int(part)] if isinstance(data, list) else data[part]
    data.pop(parts[-1], None)
