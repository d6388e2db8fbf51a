"""The CustomResourceDefinition and docs/api.md, made from the models, and docs/metrics.md, made from the catalogue:
`python -m trireme_api.crd` writes them.

pydantic's JSON schema becomes a structural schema (no $ref, no anyOf but for int-or-string, OpenAPI 3.0 forms). CEL
rules stand in one place, `x-kubernetes-validations` at the schema's root, so that one patch strips them for servers
before 1.25; the operator checks the same things itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from trireme_api import crd_docs, metrics_docs
from trireme_api.job import (
    GROUP,
    KIND,
    MAX_NAME_LENGTH,
    PLURAL,
    SHORT_NAME,
    SINGULAR,
    VERSION,
    TrainingJobSpec,
    TrainingJobStatus,
)

Schema = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
CRD_FILE = Path("manifests/crd/trainingjobs.yaml")
DOCS_FILE = Path("docs/api.md")
METRICS_FILE = Path("docs/metrics.md")
HEADER = "# Made by `make docs` from api/trireme_api/job.py; edit the models, not this file.\n"

CEL_RULES = (
    (
        f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
        f"metadata.name: must be at most {MAX_NAME_LENGTH} characters, because pods are named after it",
    ),
    (
        "has(self.spec.recipe) || (has(self.spec.template) && has(self.spec.template.image) && "
        "has(self.spec.template.command) && size(self.spec.template.command) > 0)",
        "spec: give a recipe, or your own script as template.image and template.command",
    ),
    (
        "!has(self.spec.recipe) || has(self.spec.checkpoint)",
        "spec.checkpoint.uri: is required with a recipe, or a failure would cost the whole run",
    ),
    (
        "!has(self.spec.recipe) || !has(self.spec.template) || "
        "((!has(self.spec.template.command) || size(self.spec.template.command) == 0) && "
        "(!has(self.spec.template.args) || size(self.spec.template.args) == 0))",
        "spec.template: command and args are for your own script; with a recipe leave them out",
    ),
    (
        "!has(self.spec.replicas) || !has(self.spec.replicas.min) || "
        "self.spec.replicas.min <= self.spec.replicas.desired",
        "spec.replicas.min: must be at most desired",
    ),
    (
        "!has(self.spec.replicas) || !has(self.spec.replicas.max) || "
        "self.spec.replicas.max >= self.spec.replicas.desired",
        "spec.replicas.max: must be at least desired",
    ),
    (
        "!has(self.spec.replicas) || !has(self.spec.replicas.allowed) || size(self.spec.replicas.allowed) == 0 || "
        "self.spec.replicas.desired in self.spec.replicas.allowed",
        "spec.replicas.desired: must be one of replicas.allowed",
    ),
    (
        "!has(self.spec.recipe) || (has(self.spec.recipe.until.tokens) != has(self.spec.recipe.until.steps))",
        "spec.recipe.until: give either tokens or steps",
    ),
    (
        "!has(self.spec.recipe) || self.spec.recipe.batch.tokens % self.spec.recipe.data.sequenceLength == 0",
        "spec.recipe.batch.tokens: must be a multiple of data.sequenceLength",
    ),
)

COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Nodes", "string", ".status.nodeSummary", 0),
    ("Step", "integer", ".status.progress.step", 0),
    ("Loss", "number", ".status.progress.loss", 0),
    ("Tok/s", "number", ".status.progress.tokensPerSecond", 0),
    ("TFLOPS", "number", ".status.progress.tflops", 0),
    ("MFU", "number", ".status.progress.mfu", 0),
    ("Restarts", "integer", ".status.restartCount", 0),
    ("Goodput", "string", ".status.goodput.summary", 0),
    ("CO2e", "string", ".status.carbon.summary", 0),
    ("ETA", "string", ".status.progress.remaining", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Why", "string", ".status.reason", 0),
    ("Explanation", "string", ".status.explanation", 1),
)
"""(name, type, JSON path, priority); priority 1 is shown by `-o wide` only."""


def structural(schema: Schema, definitions: Schema) -> Schema:
    """One pydantic schema node as a structural one. Raises ValueError for a form that has no structural equivalent."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        inner = structural(definitions[name], definitions)
        return {**inner, **_about({k: v for k, v in schema.items() if k != "$ref"})}
    if "anyOf" in schema:
        return {**_union(schema["anyOf"], definitions), **_about(schema)}
    if "allOf" in schema and len(schema["allOf"]) == 1:
        return {**structural(schema["allOf"][0], definitions), **_about(schema)}
    if "const" in schema:
        return {"type": "string", "enum": [schema["const"]], **_about(schema)}
    kind = schema.get("type")
    if kind is None and set(schema) <= {"title", "description", "default"}:
        return {"x-kubernetes-preserve-unknown-fields": True, **_about(schema)}
    found: Schema = {"type": kind, **_about(schema)}
    if kind == "object":
        _object(schema, definitions, found)
    elif kind == "array":
        _array(schema, definitions, found)
    elif kind in ("integer", "number", "string", "boolean"):
        _scalar(schema, found)
    else:
        raise ValueError(f"no structural form for {schema}")
    return found


def _about(schema: Schema) -> Schema:
    found: Schema = {}
    if schema.get("description"):
        found["description"] = schema["description"]
    default = _without_none(schema.get("default"))
    if default not in (None, ""):  # Kubernetes 1.20 reads a default of "" as null and refuses the CRD
        found["default"] = default
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _union(options: list[Schema], definitions: Schema) -> Schema:
    options = [option for option in options if option.get("type") != "null"]
    if len(options) == 1:
        return structural(options[0], definitions)
    kinds = {option.get("type", "string" if "const" in option else None) for option in options}
    if "boolean" in kinds:
        return {"x-kubernetes-preserve-unknown-fields": True}
    if kinds <= {"integer", "number", "string"}:
        return {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    raise ValueError(f"no structural form for a union of {sorted(map(str, kinds))}")


def _object(schema: Schema, definitions: Schema, found: Schema) -> None:
    if "properties" in schema:
        found["properties"] = {name: structural(item, definitions) for name, item in schema["properties"].items()}
        if schema.get("required"):
            found["required"] = list(schema["required"])
        return
    items = schema.get("additionalProperties")
    if isinstance(items, dict) and items:
        found["additionalProperties"] = structural(items, definitions)
    else:
        found["x-kubernetes-preserve-unknown-fields"] = True
    if "maxProperties" in schema:
        found["maxProperties"] = schema["maxProperties"]


def _array(schema: Schema, definitions: Schema, found: Schema) -> None:
    if "prefixItems" in schema:
        forms = [structural(item, definitions) for item in schema["prefixItems"]]
        if any(form != forms[0] for form in forms):
            raise ValueError("a tuple of different types has no structural form")
        found["items"] = forms[0]
    else:
        found["items"] = structural(schema["items"], definitions)
    for name in ("minItems", "maxItems"):
        if name in schema:
            found[name] = schema[name]


def _scalar(schema: Schema, found: Schema) -> None:
    for name in ("enum", "minLength", "maxLength", "pattern", "minimum", "maximum"):
        if name in schema:
            found[name] = schema[name]
    for name, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if name in schema:
            found[bound], found[name] = schema[name], True


def model_schema(model: type[TrainingJobSpec] | type[TrainingJobStatus]) -> Schema:
    schema = model.model_json_schema(by_alias=True)
    return structural(schema, schema.get("$defs", {}))


def crd() -> Schema:
    spec, status = model_schema(TrainingJobSpec), model_schema(TrainingJobStatus)
    spec.pop("description", None)
    # Written by the operator alone: fields of a newer version must survive an older CRD.
    status["x-kubernetes-preserve-unknown-fields"] = True
    status.pop("default", None)
    _undefault(status)
    conditions = status["properties"]["conditions"]
    conditions["items"]["required"] = ["type", "status"]
    conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"] = "map", ["type"]
    root = {
        "type": "object",
        "description": "One training run: what to train, on how many nodes, and what to do when something breaks.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in CEL_RULES],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": root},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas.desired",
                            "statusReplicasPath": ".status.replicas.size",
                            "labelSelectorPath": ".status.replicas.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}
                        for name, kind, path, priority in COLUMNS
                    ],
                }
            ],
        },
    }


def _undefault(schema: Schema) -> None:
    """A default in status would make the server write what nobody observed."""
    schema.pop("default", None)
    schema.pop("required", None)
    for item in (schema.get("properties") or {}).values():
        _undefault(item)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            _undefault(schema[name])


def strip_cel(definition: Schema) -> Schema:
    """The same CRD for a server that does not know CEL (before 1.25)."""
    stripped: Schema = yaml.safe_load(yaml.safe_dump(definition))
    for version in stripped["spec"]["versions"]:
        version["schema"]["openAPIV3Schema"].pop("x-kubernetes-validations", None)
    return stripped


class _Dumper(yaml.SafeDumper):
    """No anchors: kubectl reads them, people do not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml() -> str:
    return HEADER + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def outputs() -> dict[Path, str]:
    """Every generated file (relative to the repository) and what must stand in it."""
    docs = crd_docs.page(model_schema(TrainingJobSpec), model_schema(TrainingJobStatus), CEL_RULES, COLUMNS)
    return {CRD_FILE: crd_yaml(), DOCS_FILE: docs, METRICS_FILE: metrics_docs.page()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trireme_api.crd", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    check = parser.parse_args().check
    stale = []
    for path, text in outputs().items():
        target = ROOT / path
        if target.exists() and target.read_text() == text:
            continue
        stale.append(str(path))
        if not check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    if stale:
        print(("not up to date, run `make docs`: " if check else "wrote ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
