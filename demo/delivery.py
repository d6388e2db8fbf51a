"""How the nodes come by the project's images: what the environment and the kind of cluster say about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from demo.report import DemoError

REGISTRY = "TRIREME_REGISTRY"
IMAGES = "TRIREME_IMAGES"
PRELOADED = "preloaded"
LOCAL = "localhost/trireme"
EXISTING = "existing"


@dataclass(frozen=True)
class Delivery:
    how: Literal["import", "push", "preloaded"]
    prefix: str
    """What the images' names begin with, without the last slash."""
    pull_policy: str


def registry(environment: Mapping[str, str]) -> str:
    """TRIREME_REGISTRY as a prefix of image names; empty when it is not set."""
    given = environment.get(REGISTRY, "").strip().rstrip("/")
    if "://" in given or any(c.isspace() or c.isupper() for c in given):
        raise DemoError(f"{REGISTRY}={given}: write it as registry.example/prefix, in small letters, without https://")
    return given


def choose(kind: str, environment: Mapping[str, str]) -> Delivery:
    """For a cluster of this machine the images are imported; one of KUBECONFIG needs to be told where they are."""
    prefix, state = registry(environment), environment.get(IMAGES, "")
    if state not in ("", PRELOADED):
        raise DemoError(f"{IMAGES}={state}: the one value it takes is {PRELOADED}")
    if kind != EXISTING:
        return Delivery("import", LOCAL, "Never")
    if state == PRELOADED:
        return Delivery("preloaded", prefix or LOCAL, "IfNotPresent" if prefix else "Never")
    if prefix:
        return Delivery("push", prefix, "IfNotPresent")
    raise DemoError(
        f"KUBECONFIG names a cluster of your own: set {REGISTRY}=registry.example/prefix and the images are pushed "
        f"there, or {IMAGES}={PRELOADED} if its nodes have those that `make images` lists"
    )
