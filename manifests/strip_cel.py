"""Writes the local overlay's patch that removes CEL rules from the CRD: servers before 1.25 do not know the field, and
kubectl refuses it for them. The operator makes the same checks, so nothing is lost but an earlier answer.

Kustomize cannot remove a field wherever it occurs, so the patch names each place; run this after the CRD has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).resolve().parent
CRD = MANIFESTS / "crd" / "trainingjobs.yaml"
PATCH = MANIFESTS / "overlays" / "local" / "strip-cel.yaml"
FIELD = "x-kubernetes-validations"


def places(value: Any, path: str = "") -> Iterator[str]:
    """JSON pointers of every CEL field."""
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"
            if key == FIELD:
                yield here
            else:
                yield from places(inner, here)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, f"{path}/{index}")


def patch(crd: Any) -> str:
    head = "# Made by manifests/strip_cel.py; do not edit.\n"
    return head + yaml.safe_dump([{"op": "remove", "path": path} for path in places(crd)], width=200)


if __name__ == "__main__":
    PATCH.write_text(patch(yaml.safe_load(CRD.read_text())))
