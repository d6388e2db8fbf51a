"""A base image without a registry: Debian's own bootstrap, with Python, as `localhost/trireme-base`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import List

from . import debian
from .build import require_space
from .paths import cache_dir
from .report import say, step
from .shell import run

NAME = "localhost/trireme-base"
PACKAGES = ("ca-certificates", "python3", "python3-venv", "python3-pip")
NEEDED_BYTES = 2 * 1024**3
# Nothing that a container reads: package caches and lists, manuals, translations.
NOT_SHIPPED = (
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./var/log/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./run/*",
    "./tmp/*",
)


def key() -> str:
    """Changes with whatever goes into the image."""
    return hashlib.sha256(repr((debian.RELEASE, PACKAGES, NOT_SHIPPED)).encode()).hexdigest()[:12]


def tag() -> str:
    return f"{NAME}:{debian.RELEASE}-{key()}"


def rootfs() -> Path:
    """Tar of the root file system, made once (under a minute) and kept in the cache."""
    target = cache_dir() / "images" / f"base-{debian.RELEASE}-{key()}.tar"
    if target.is_file():
        return target
    debian.require_debian("making a base image")
    debian.install({"debootstrap": "debootstrap"})
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, NEEDED_BYTES, "a base image")
    tree = target.with_suffix(".rootfs")
    shutil.rmtree(tree, ignore_errors=True)
    mirror = debian.debian_mirror()
    log = target.with_suffix(".log")
    log.unlink(missing_ok=True)
    with step(f"debootstrap {debian.RELEASE} with {' '.join(PACKAGES)} (log: {log})"):
        command: List[str] = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        if mirror.signed_by:
            command.append(f"--keyring={mirror.signed_by}")
        run([*command, debian.RELEASE, str(tree), mirror.uri], log=log)
    with step("packing the base image"):
        scratch = target.with_suffix(".new")
        excludes = [f"--exclude={pattern}" for pattern in NOT_SHIPPED]
        run(
            [
                "tar",
                "--create",
                f"--file={scratch}",
                f"--directory={tree}",
                "--numeric-owner",
                "--sort=name",
                *excludes,
                ".",
            ]
        )
        scratch.rename(target)
        shutil.rmtree(tree)
    say(f"  base image: {target.stat().st_size / 2**20:.0f} MiB")
    return target
