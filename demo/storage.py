"""Where a job's data lies: a folder of this machine, or claims of a cluster that only its pods can see.

Paths are those of `pvc://`: the claim's name, then the place in it, e.g. `checkpoints/opt-8m/metrics.jsonl`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from trireme_api.protocol import PVC_ROOT

from demo.kube import Kube
from demo.report import DemoError, say

CLAIMS = ("corpus", "checkpoints")


class Storage(Protocol):
    @property
    def node_selector(self) -> Mapping[str, str]:
        """What pods that use the claims must select nodes by: empty where every node can mount them."""

    def put(self, source: Path, path: str) -> None:
        """Makes `path` a copy of the folder `source`, readable by any user."""

    def text(self, path: str) -> str:
        """The file's content, empty where there is none."""

    def remove(self, path: str) -> None:
        """Removes a file or folder with all in it, if it is there."""

    def verify(self, path: str) -> str:
        """The command by which a person verifies the checkpoints at `path`."""


@dataclass(frozen=True)
class Folder:
    """Claims that are folders of this machine."""

    claims: Mapping[str, Path]
    node_selector: Mapping[str, str] = field(default_factory=dict)

    def at(self, path: str) -> Path:
        claim, _, place = path.partition("/")
        return self.claims[claim] / place

    def put(self, source: Path, path: str) -> None:
        target = self.at(path)
        new = target.with_name(target.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new)
        # Pods run as another user than whoever puts.
        for inner in (new, *new.rglob("*")):
            inner.chmod(0o755 if inner.is_dir() else 0o644)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)

    def text(self, path: str) -> str:
        try:
            return self.at(path).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def remove(self, path: str) -> None:
        target = self.at(path)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def verify(self, path: str) -> str:
        return f"{Path(sys.executable).parent / 'trireme'} checkpoints verify {self.at(path)}"


# Unpacked beside the target and then renamed: a transfer that breaks off leaves what was there before.
UNPACK = """
import os, shutil, sys, tarfile
target = sys.argv[1]
new = target + ".new"
shutil.rmtree(new, ignore_errors=True)
os.makedirs(new)
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz") as archive:
    archive.extractall(new)
shutil.rmtree(target, ignore_errors=True)
os.rename(new, target)
"""
TRIES = 3


@dataclass(frozen=True)
class InPod:
    """Claims seen through a pod that mounts all of them where training pods do."""

    kube: Kube
    pod: str
    node_selector: Mapping[str, str] = field(default_factory=dict)

    def put(self, source: Path, path: str) -> None:
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
                for inner in sorted(source.rglob("*")):
                    archive.add(inner, str(inner.relative_to(source)), recursive=False, filter=_anybody)
            packed.flush()
            self._run("python3", "-c", UNPACK, _inside(path), packed=packed)

    def text(self, path: str) -> str:
        return self._run("sh", "-c", '[ ! -e "$0" ] || cat "$0"', _inside(path))

    def remove(self, path: str) -> None:
        self._run("rm", "-rf", "--", _inside(path))

    def verify(self, path: str) -> str:
        place = shlex.quote(_inside(path))
        return f"kubectl -n {self.kube.namespace} exec {self.pod} -- trireme checkpoints verify {place}"

    def _run(self, *command: str, packed: IO[bytes] | None = None) -> str:
        """None of the commands fails by itself, so a failure is the connection's, and worth another try."""
        for attempt in range(1, TRIES + 1):
            if packed is not None:
                os.lseek(packed.fileno(), 0, os.SEEK_SET)
            try:
                return self.kube.exec(self.pod, *command, source=packed, timeout=300)
            except DemoError as error:
                if attempt == TRIES:
                    raise
                say(f"  once more: {error}")
                time.sleep(2 * attempt)
        raise AssertionError("unreachable")


def _inside(path: str) -> str:
    return f"{PVC_ROOT}/{path}"


def _anybody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry
