"""Which cluster to use: the user's own (KUBECONFIG), kind on Docker, or the built-in one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from . import kind
from .lifecycle import Cluster
from .paths import ClusterPaths
from .report import ClusterError
from .shell import run, succeeds, which
from .state import State

EXISTING, KIND, BUILTIN = "existing", "kind", "builtin"
KINDS = (EXISTING, KIND, BUILTIN)


@dataclass(frozen=True)
class Choice:
    """kind: one of KINDS; reason: why, in one line."""

    kind: str
    reason: str


def docker_daemon() -> bool:
    """True when a Docker daemon answers; the command alone is often there without one."""
    return which("docker") is not None and succeeds(["docker", "version", "--format", "{{.Server.Version}}"])


def decide(environment: Mapping[str, str], *, own_kubeconfig: Path, has_kind: bool, has_daemon: bool) -> Choice:
    """Pure: the built-in cluster's own kubeconfig in KUBECONFIG means the built-in cluster."""
    given = environment.get("KUBECONFIG")
    if given and first_path(given) != own_kubeconfig:
        return Choice(EXISTING, f"KUBECONFIG={given}")
    if has_kind and has_daemon:
        return Choice(KIND, "kind and a Docker daemon are here")
    lacking = [text for present, text in ((has_kind, "no kind"), (has_daemon, "no Docker daemon")) if not present]
    return Choice(BUILTIN, ", ".join(["no KUBECONFIG", *lacking]))


def first_path(kubeconfig: str) -> Path:
    """KUBECONFIG may list several files; kubectl writes to and we name the first."""
    return Path(kubeconfig.split(os.pathsep)[0]).absolute()


def choose(wanted: str, name: str) -> Choice:
    """The backend asked for, or the one that `auto` finds. A cluster that is up decides for itself."""
    if wanted != "auto":
        return Choice(wanted, "asked for by --backend")
    recorded = _recorded(name)
    has_kind = which("kind") is not None
    choice = decide(
        os.environ,
        own_kubeconfig=ClusterPaths(name).kubeconfig,
        has_kind=has_kind,
        has_daemon=has_kind and docker_daemon(),
    )
    if recorded is not None and choice.kind != EXISTING:
        return Choice(recorded, f"cluster {name} is one of this kind")
    return choice


def current(name: str) -> Choice:
    """The backend of the cluster that commands other than `up` speak of."""
    return choose("auto", name)


def _recorded(name: str) -> Optional[str]:
    state = State.load(ClusterPaths(name).record)
    return state.backend if state is not None else None


def kubeconfig(choice: Choice, name: str) -> Path:
    if choice.kind == EXISTING:
        given = os.environ.get("KUBECONFIG")
        if not given:
            raise ClusterError("--backend existing needs KUBECONFIG to be set")
        return first_path(given)
    return ClusterPaths(name).kubeconfig


def up(choice: Choice, name: str, nodes: int, options: Dict[str, Any], port: int) -> str:
    """Bring the cluster up; returns in one word what was done."""
    if choice.kind == EXISTING:
        kubeconfig(choice, name)
        run(["kubectl", "get", "--raw", "/readyz"], timeout=30)
        return "existing"
    if choice.kind == KIND:
        return kind.up(ClusterPaths(name), nodes, port)
    return Cluster(name).up(nodes, options, port)


def down(name: str) -> bool:
    """Remove a cluster that we made; one named by KUBECONFIG is the user's and is left alone."""
    if _recorded(name) == KIND:
        return kind.down(ClusterPaths(name))
    return Cluster(name).down()
