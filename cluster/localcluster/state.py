"""What a running cluster is made of, kept on disk so that any later command can find and end it."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from .paths import ClusterPaths
from .plan import Plan
from .report import ClusterError

FORMAT = 1


@dataclass
class Process:
    """A started program. `started` (clock ticks after boot) tells it from a later process with the same id."""

    pid: int
    started: int
    argv: List[str]
    log: str
    environment: Dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass
class State:
    """The record of one cluster (state.json)."""

    plan: Plan
    backend: str = "builtin"
    boot_id: str = ""
    host_port: int = 0
    version: str = ""
    nodes: List[int] = field(default_factory=list)
    options: Dict[str, Any] = field(default_factory=dict)
    processes: Dict[str, Process] = field(default_factory=dict)
    made_directories: List[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Replace the file in one step, so that a crash never leaves half a record."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = asdict(self)
        data["format"] = FORMAT
        scratch = path.with_suffix(".new")
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as sink:
            json.dump(data, sink, indent=1)
        os.replace(scratch, path)

    @classmethod
    def load(cls, path: Path) -> Optional["State"]:
        """None when there is no record; an unreadable one counts as none, teardown then works by name."""
        try:
            data = json.loads(path.read_text())
            if data.pop("format", None) != FORMAT:
                return None
            data["plan"] = Plan(**data["plan"])
            data["processes"] = {name: Process(**entry) for name, entry in data["processes"].items()}
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def boot_id() -> str:
    """Changes with every boot: a record from before a reboot describes nothing that still runs."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextmanager
def locked(paths: ClusterPaths) -> Iterator[None]:
    """One command at a time changes a cluster; others wait their turn."""
    paths.lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            handle = open(paths.lock, "w")  # noqa: SIM115 - the descriptor is the lock and closes below
        except PermissionError as error:
            raise ClusterError(
                f"{paths.lock} belongs to another user: run as that user, or set TRIREME_CLUSTER_DIR"
            ) from error
        fcntl.flock(handle, fcntl.LOCK_EX)
        # `down` removes the file while it holds it, and then this is a lock on nothing: take the new one.
        if paths.lock.exists() and os.fstat(handle.fileno()).st_ino == paths.lock.stat().st_ino:
            break
        handle.close()
        paths.lock.parent.mkdir(parents=True, exist_ok=True)
    with handle:
        yield
