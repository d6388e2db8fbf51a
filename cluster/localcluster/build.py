"""Kubernetes' own programs, built once from Debian's source package and cached.

Debian 12 carries the complete, vendored source of Kubernetes 1.20. Its vendored modern-go/reflect2 1.0.1
crashes when compiled by Go >= 1.18 (the API server dies at the first custom object), so that one folder is
replaced by Debian's package of reflect2 1.0.2.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Dict

from . import debian
from .paths import cache_dir
from .report import ClusterError, say, step
from .shell import environment, run

PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubemark")
REFLECT2 = "vendor/github.com/modern-go/reflect2"
REFLECT2_PACKAGE = "golang-github-modern-go-reflect2-dev"
NEEDED_BYTES = 7 * 1024**3
# The commit that upstream tagged v1.20.2: what `--version` of the official binaries prints.
VERSION: Dict[str, str] = {
    "KUBE_GIT_VERSION": "v1.20.2",
    "KUBE_GIT_MAJOR": "1",
    "KUBE_GIT_MINOR": "20",
    "KUBE_GIT_TREE_STATE": "clean",
    "KUBE_GIT_COMMIT": "faecb196815e248d3ecfb03c680a4507229c2a56",
}
RECIPE = 1


def cached() -> Path:
    """Folder of the built programs; the name changes with whatever the result depends on."""
    recipe = repr((RECIPE, PROGRAMS, REFLECT2_PACKAGE, sorted(VERSION.items()), debian.RELEASE))
    return (
        cache_dir() / "kubernetes" / f"{VERSION['KUBE_GIT_VERSION']}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"
    )


def is_built() -> bool:
    return all((cached() / program).is_file() for program in PROGRAMS)


def build() -> Path:
    """Build unless cached (about 8 minutes on 2 cores); returns the folder of programs."""
    target = cached()
    if is_built():
        return target
    debian.require_debian("building Kubernetes")
    cache_dir().mkdir(parents=True, exist_ok=True)
    require_space(cache_dir(), NEEDED_BYTES, "building Kubernetes")
    say("building Kubernetes from Debian's source package: once, about 8 minutes on 2 cores")
    debian.install(debian.BUILD_TOOLS)
    work = cache_dir() / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with step("fetching the source package"):
        apt = debian.PrivateApt(cache_dir() / "apt")
        tree = apt.source("kubernetes", work / "src")
        _require_version(tree)
        _replace_reflect2(apt, tree, work)
    log = cache_dir() / "kubernetes-build.log"
    log.unlink(missing_ok=True)
    with step(f"compiling {' '.join(PROGRAMS)} (log: {log})"):
        settings = dict(
            VERSION, GOCACHE=str(work / "go-cache"), GOPATH=str(work / "go"), GOFLAGS="-mod=vendor", GOPROXY="off"
        )
        if not os.environ.get("GOMAXPROCS"):
            settings["GOMAXPROCS"] = str(os.cpu_count() or 2)
        targets = " ".join(f"cmd/{program}" for program in PROGRAMS)
        run(["nice", "-n", "5", "make", f"WHAT={targets}"], cwd=tree, env=settings, log=log)
    _keep(tree / "_output" / "bin", target)
    with step("removing the build tree"):
        # Go marks parts of its module cache read-only.
        run(["chmod", "-R", "u+w", str(work)], env=environment())
        shutil.rmtree(work)
    return target


def require_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ClusterError(
            f"{what} needs {needed / 1e9:.1f} GB free under {folder}, only {free / 1e9:.1f} GB are: "
            "free some, or point TRIREME_CACHE or TRIREME_CLUSTER_DIR elsewhere"
        )


def _require_version(tree: Path) -> None:
    wanted = VERSION["KUBE_GIT_VERSION"].lstrip("v")
    if not re.search(rf"(^|[^0-9.]){re.escape(wanted)}$", tree.name):
        raise ClusterError(
            f"the mirror's kubernetes source is {tree.name}, not {wanted}: set KUBEBUILDER_ASSETS to built programs"
        )


def _replace_reflect2(apt: debian.PrivateApt, tree: Path, work: Path) -> None:
    deb = apt.download([REFLECT2_PACKAGE], work / "reflect2")[0]
    run(["dpkg-deb", "-x", str(deb), str(work / "reflect2")])
    vendored = tree / REFLECT2
    shutil.rmtree(vendored)
    shutil.copytree(work / "reflect2/usr/share/gocode/src/github.com/modern-go/reflect2", vendored)


def _keep(built: Path, target: Path) -> None:
    scratch = target.with_name(target.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for program in PROGRAMS:
        shutil.copy2(built / program, scratch / program)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
