"""docs/api.md: every field of spec and status as tables, from the same schemas as the CRD."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

Schema = dict[str, Any]


def page(spec: Schema, status: Schema, rules: Sequence[tuple[str, str]], columns: Sequence[tuple[Any, ...]]) -> str:
    lines = [
        "# TrainingJob (trireme.dev/v1alpha1)",
        "",
        "Made by `make docs` from `api/trireme_api/job.py`; edit the models, not this page. Short name `tj`.",
        "An unknown field is an error that names the nearest known one. **Bold**: required.",
        "",
        "`kubectl get tj` shows " + ", ".join(str(column[0]).upper() for column in columns if not column[3]) + ".",
        "",
        "## spec",
        "",
        *_table("spec", spec),
        "",
        "Beyond the types:",
        "",
        *(f"- {message}" for _, message in rules),
        "",
        "## status",
        "",
        "Written by the operator alone.",
        "",
        *_table("status", status),
    ]
    return "\n".join(lines) + "\n"


def _table(path: str, schema: Schema) -> Iterator[str]:
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    yield from _rows(path, schema)


def _rows(path: str, schema: Schema) -> Iterator[str]:
    required = schema.get("required") or []
    for name, field in (schema.get("properties") or {}).items():
        where = f"{path}.{name}"
        shown = f"**`{where}`**" if name in required else f"`{where}`"
        default = "" if "default" not in field or _nested(field) else f"`{json.dumps(field['default'])}`"
        about = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        yield f"| {shown} | {_type(field)} | {default} | {about} |"
        inner = field.get("items") if field.get("type") == "array" else field.get("additionalProperties")
        if field.get("properties"):
            yield from _rows(where, field)
        elif isinstance(inner, dict) and inner.get("properties"):
            yield from _rows(where + ("[]" if field.get("type") == "array" else ".*"), inner)


def _nested(field: Schema) -> bool:
    return bool(field.get("properties"))


def _type(field: Schema) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{value}`" if value else '`""`' for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "integer or string"
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field['items'])}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"map to {_type(field['additionalProperties'])}"
    return kind + _bounds(field)


def _bounds(field: Schema) -> str:
    parts = []
    if "minimum" in field:
        parts.append(f"{'>' if field.get('exclusiveMinimum') else '≥'} {field['minimum']:g}")
    if "maximum" in field:
        parts.append(f"≤ {field['maximum']:g}")
    if "maxLength" in field:
        parts.append(f"at most {field['maxLength']} characters")
    return f" ({', '.join(parts)})" if parts else ""
