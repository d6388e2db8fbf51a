"""Which program files a cluster runs: the user's (KUBEBUILDER_ASSETS), the cache's, or freshly built ones."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple

from . import build, debian
from .report import ClusterError
from .shell import run

CONTROL_PLANE = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
NODE = ("kubelet", "kube-proxy")


@dataclass(frozen=True)
class Binaries:
    """Program files by name."""

    kubernetes: Path
    system: Path
    fallback: Optional[Path] = None

    def path(self, program: str) -> str:
        """Full path of a program; raises ClusterError when the given folder lacks it."""
        candidates = [self.kubernetes / program]
        if self.fallback is not None:
            candidates.append(self.fallback / program)
        if program in debian.UNPACKED:
            candidates.append(self.system / debian.UNPACKED[program][1])
        for candidate in candidates:
            if candidate.is_file():
                return str(candidate)
        raise ClusterError(f"{self.kubernetes} has no {program}: add it there or unset KUBEBUILDER_ASSETS")

    @property
    def cni(self) -> str:
        return str(self.system / "usr/lib/cni")

    @property
    def search_path(self) -> str:
        """PATH for containerd, which finds its shim and runc there."""
        return f"{self.system}/usr/bin:{self.system}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin"

    def version(self) -> Tuple[int, int]:
        """(major, minor) of the API server, which some flags depend on."""
        return parse_version(run([self.path("kube-apiserver"), "--version"]))


def parse_version(text: str) -> Tuple[int, int]:
    """(1, 20) of `Kubernetes v1.20.2`."""
    match = re.search(r"v(\d+)\.(\d+)", text)
    if match is None:
        raise ClusterError(f"kube-apiserver --version printed {text.strip()!r}, which holds no version")
    return int(match.group(1)), int(match.group(2))


def find(*, nodes: bool) -> Binaries:
    """Programs for a whole cluster, or (nodes=False) for an API server alone; builds what is missing.

    A newer API server must not meet older components, so KUBEBUILDER_ASSETS must hold all of Kubernetes'
    programs that are needed; etcd may come from there or from Debian.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        return Binaries(kubernetes=build.build(), system=debian.unpack_programs())
    folder = Path(assets).absolute()
    needed = CONTROL_PLANE + NODE if nodes else ("kube-apiserver",)
    lacking = [program for program in needed if not (folder / program).is_file()]
    if lacking:
        raise ClusterError(f"KUBEBUILDER_ASSETS={assets} lacks {', '.join(lacking)}: add them or unset the variable")
    if nodes or not (folder / "etcd").is_file():
        return Binaries(kubernetes=folder, system=debian.unpack_programs())
    return Binaries(kubernetes=folder, system=debian.unpacked_root())
