"""Where things live: a cache that outlives clusters, and one state folder per cluster that does not."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_NAME = "trireme"


def cache_dir() -> Path:
    """Built binaries, unpacked packages and base images (`TRIREME_CACHE`, else ~/.cache/trireme)."""
    return Path(os.environ.get("TRIREME_CACHE") or Path.home() / ".cache" / "trireme")


def clusters_dir() -> Path:
    """Folder of all clusters' state (`TRIREME_CLUSTER_DIR`, else .cluster in the repository)."""
    return Path(os.environ.get("TRIREME_CLUSTER_DIR") or REPOSITORY / ".cluster").absolute()


@dataclass(frozen=True)
class ClusterPaths:
    """Every file of one cluster; nothing of a cluster lies anywhere else on disk."""

    RECORD: ClassVar[str] = "state.json"

    name: str

    @property
    def state(self) -> Path:
        return clusters_dir() / self.name

    @property
    def label(self) -> str:
        """Machine-wide name, of namespaces and cgroups: two checkouts may each have a cluster of the same name."""
        return f"{self.name}-{hashlib.sha256(str(self.state).encode()).hexdigest()[:4]}"

    @property
    def record(self) -> Path:
        return self.state / self.RECORD

    @property
    def lock(self) -> Path:
        """Beside the state folder, because `down` removes the folder while holding the lock."""
        return clusters_dir() / f".{self.name}.lock"

    @property
    def kubeconfig(self) -> Path:
        suffix = "" if self.name == DEFAULT_NAME else f"-{self.name}"
        return clusters_dir() / f"kubeconfig{suffix}"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def volumes(self) -> Path:
        """hostPath volumes made by `cluster.py volume`; every node sees the same files."""
        return self.state / "volumes"

    def node(self, number: int) -> Path:
        return self.state / f"node{number}"
