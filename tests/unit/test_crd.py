"""The CRD and docs/api.md are what the models say, and what an API server takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from trireme_api.crd import CEL_RULES, COLUMNS, crd, model_schema, outputs, strip_cel, structural
from trireme_api.job import TrainingJobSpec, TrainingJobStatus, parse_spec

ROOT = Path(__file__).parents[2]
SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


@pytest.mark.parametrize("path", list(outputs()), ids=str)
def test_generated_files_are_up_to_date(path: Path) -> None:
    assert (ROOT / path).read_text() == outputs()[path], "run `make docs`"


@pytest.mark.parametrize("version", ["1.26", "1.37"])
def test_the_servers_own_schema_takes_the_crd(version: str) -> None:
    kubernetes_validate.validate(crd(), version, strict=True)
    kubernetes_validate.validate(strip_cel(crd()), version, strict=True)


def nodes(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in (schema.get("properties") or {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for kind in ("items", "additionalProperties"):
        if isinstance(schema.get(kind), dict):
            yield from nodes(schema[kind], f"{path}[]")


def test_the_schema_is_structural() -> None:
    """The rules of the API server: a type everywhere (or int-or-string, or preserved), no reference, no free union."""
    for path, schema in nodes(SCHEMA):
        free = schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-preserve-unknown-fields")
        assert ("type" in schema) != bool(free and "type" not in schema), path
        assert not {"$ref", "allOf", "oneOf", "const", "prefixItems", "title"} & set(schema), path
        if "anyOf" in schema:
            assert schema.get("x-kubernetes-int-or-string"), path
        if "properties" in schema:
            assert "additionalProperties" not in schema, path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert schema.get(bound) in (None, True), path
        assert schema.get("default") not in ("", None) or "default" not in schema, path


def test_defaults_of_the_crd_are_the_models_defaults() -> None:
    """What the server fills in must mean what the operator means where nothing was filled in."""

    def filled(schema: dict[str, Any], value: Any) -> Any:
        if isinstance(value, dict) and "properties" in schema:
            for name, inner in schema["properties"].items():
                if name not in value and "default" in inner:
                    value[name] = inner["default"]
                if name in value:
                    value[name] = filled(inner, value[name])
        if isinstance(value, list) and "items" in schema:
            return [filled(schema["items"], item) for item in value]
        return value

    recipe = {
        "model": {"preset": "opt-8m"}, "data": {"sources": [{"path": "pvc://c/d"}]}, "batch": {"tokens": 4096},
        "until": {"steps": 1},
    }  # fmt: skip
    for minimal in (
        {"recipe": recipe, "checkpoint": {"uri": "pvc://c/o"}},
        {"template": {"image": "i", "command": ["c"]}},
    ):
        by_server = filled(SCHEMA["properties"]["spec"], yaml.safe_load(yaml.safe_dump(minimal)))
        assert parse_spec(by_server) == parse_spec(minimal)


def test_every_column_and_scale_path_is_in_the_schema() -> None:
    known = {path for path, _ in nodes(SCHEMA)}
    for _, _, path, _ in COLUMNS:
        assert path in known or path.startswith(".metadata"), path
    scale = crd()["spec"]["versions"][0]["subresources"]["scale"]
    assert set(scale.values()) <= known


def test_every_field_of_the_models_is_in_the_schema() -> None:
    fields = SCHEMA["properties"]["spec"]["properties"]
    assert set(fields) == {field.alias or name for name, field in TrainingJobSpec.model_fields.items()}
    assert fields["replicas"]["properties"]["desired"]["minimum"] == 1
    assert fields["procsPerNode"]["x-kubernetes-int-or-string"] is True
    assert set(model_schema(TrainingJobStatus)["properties"]) == set(SCHEMA["properties"]["status"]["properties"])


def test_status_has_no_defaults_and_keeps_what_a_newer_operator_writes() -> None:
    status = SCHEMA["properties"]["status"]
    assert status["x-kubernetes-preserve-unknown-fields"] is True
    assert not [path for path, schema in nodes(status) if "default" in schema]


def test_cel_stands_in_one_place() -> None:
    assert len(SCHEMA["x-kubernetes-validations"]) == len(CEL_RULES)
    assert "x-kubernetes-validations" not in str(strip_cel(crd()))


def test_a_form_that_cannot_be_said_is_an_error() -> None:
    with pytest.raises(ValueError, match="no structural form"):
        structural({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}, {})
