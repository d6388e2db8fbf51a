"""The few file operations a checkpoint root needs, on a POSIX filesystem and on an object store behind fsspec.

What differs is how a directory of files becomes a checkpoint at one instant: rename there, a marker written last here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from typing import IO, Any, Protocol

from trireme_trainer.checkpoint.layout import BAD, COMMITTED, Kind, Name, parse
from trireme_trainer.checkpoint.locks import exclusive


class Files(Protocol):
    """Paths are `directory` (one name under the root, "" for the root itself) and `name` (one file in it).

    Everything raises OSError (FileNotFoundError where something is not there).
    """

    root: str

    def path(self, directory: str) -> str: ...
    def exists(self) -> bool: ...
    def directories(self) -> list[str]: ...
    def make(self, directory: str) -> None: ...
    def remove(self, directory: str) -> None: ...
    def size(self, directory: str, name: str) -> int: ...
    def open_read(self, directory: str, name: str) -> IO[bytes]: ...
    def create(self, directory: str, name: str) -> contextlib.AbstractContextManager[IO[bytes]]: ...
    def replace(self, directory: str, name: str, data: bytes) -> None: ...
    def sync(self, directory: str) -> None: ...
    def lock(self) -> contextlib.AbstractContextManager[None]: ...

    def working(self, step: int, attempt: int) -> str: ...
    def committed(self) -> dict[int, str]: ...
    def publish(self, working: str, manifest_sha256: str) -> str: ...
    def marker(self, committed: str) -> str | None: ...
    def withdraw(self, committed: str, attempt: int) -> str: ...
    def set_aside(self, committed: str, attempt: int, reason: str) -> str: ...
    def leftovers(self) -> list[str]: ...
    def bad(self) -> list[str]: ...


class PosixFiles:
    """A directory of this machine or of a shared filesystem (NFS, Lustre, a mounted claim)."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, directory: str) -> str:
        return os.path.join(self.root, directory) if directory else self.root

    def exists(self) -> bool:
        return os.path.isdir(self.root)

    def directories(self) -> list[str]:
        try:
            with os.scandir(self.root) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def make(self, directory: str) -> None:
        os.makedirs(self.path(directory), exist_ok=True)

    def remove(self, directory: str) -> None:
        shutil.rmtree(self.path(directory))

    def size(self, directory: str, name: str) -> int:
        found = os.lstat(os.path.join(self.path(directory), name))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{name} is not a regular file")
        return found.st_size

    def open_read(self, directory: str, name: str) -> IO[bytes]:
        # A link in a checkpoint could lead a privileged reader to someone else's file.
        descriptor = os.open(os.path.join(self.path(directory), name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return os.fdopen(descriptor, "rb")

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[IO[bytes]]:
        """A new file; on its disk when the block ends without an error."""
        with open(os.path.join(self.path(directory), name), "xb", buffering=2**20) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def replace(self, directory: str, name: str, data: bytes) -> None:
        """The file has either its old content or `data`, also after a crash."""
        target = os.path.join(self.path(directory), name)
        partial = f"{target}.{os.getpid()}.part"
        try:
            with open(partial, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        self.sync(directory)

    def sync(self, directory: str) -> None:
        """Makes names (creations, renames) in the directory survive a power cut."""
        descriptor = os.open(self.path(directory), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return exclusive(os.path.join(self.root, ".lock"))

    def working(self, step: int, attempt: int) -> str:
        return str(Name(step, attempt, Kind.TEMPORARY))

    def committed(self) -> dict[int, str]:
        found = {}
        for directory in self.directories():
            name = parse(directory)
            if name is not None and name.attempt is None and name.kind is Kind.PLAIN:
                found[name.step] = directory
        return found

    def publish(self, working: str, manifest_sha256: str) -> str:
        name = parse(working)
        assert name is not None
        final = str(Name(name.step, None, Kind.PLAIN))
        os.rename(self.path(working), self.path(final))
        return final

    def marker(self, committed: str) -> str | None:
        """sha256 of the manifest as it was committed, where a marker tells; here the rename is the commit."""
        return None

    def withdraw(self, committed: str, attempt: int) -> str:
        return self._move(committed, attempt, Kind.TRASH)

    def set_aside(self, committed: str, attempt: int, reason: str) -> str:
        moved = self._move(committed, attempt, Kind.BAD)
        self.replace(moved, BAD, json.dumps({"reason": reason}).encode())
        return moved

    def leftovers(self) -> list[str]:
        return [d for d in self.directories() if (name := parse(d)) and name.kind in (Kind.TEMPORARY, Kind.TRASH)]

    def bad(self) -> list[str]:
        return [d for d in self.directories() if (name := parse(d)) and name.kind is Kind.BAD]

    def _move(self, directory: str, attempt: int, kind: Kind) -> str:
        name = parse(directory)
        assert name is not None
        moved = str(Name(name.step, attempt, kind))
        if os.path.isdir(self.path(moved)):
            self.remove(moved)
        os.rename(self.path(directory), self.path(moved))
        self.sync("")
        return moved


class ObjectFiles:
    """Any fsspec filesystem. No rename is used: objects appear whole, and COMMITTED.json makes a checkpoint of them.

    An object store has no lock either: two attempts at the same instant are kept apart by their directories alone.
    """

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.root = url.rstrip("/")
        self._fs = filesystem
        self._base = root.rstrip("/")

    def path(self, directory: str) -> str:
        return f"{self.root}/{directory}" if directory else self.root

    def exists(self) -> bool:
        return bool(self._fs.exists(self._base))

    def directories(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._base, detail=True)
        except FileNotFoundError:
            return []
        return [e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"]

    def make(self, directory: str) -> None:
        self._fs.makedirs(self._key(directory), exist_ok=True)

    def remove(self, directory: str) -> None:
        # The marker first: a checkpoint that is half deleted must not look committed.
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._key(directory, COMMITTED))
        self._fs.invalidate_cache()
        self._fs.rm(self._key(directory), recursive=True)

    def size(self, directory: str, name: str) -> int:
        self._fs.invalidate_cache()
        return int(self._fs.size(self._key(directory, name)))

    def open_read(self, directory: str, name: str) -> IO[bytes]:
        stream: IO[bytes] = self._fs.open(self._key(directory, name), "rb")
        return stream

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[IO[bytes]]:
        with self._fs.open(self._key(directory, name), "wb") as stream:
            yield stream

    def replace(self, directory: str, name: str, data: bytes) -> None:
        self._fs.makedirs(self._key(directory), exist_ok=True)
        with self._fs.open(self._key(directory, name), "wb") as stream:
            stream.write(data)

    def sync(self, directory: str) -> None:
        """Nothing to do: an object is durable when its upload is acknowledged."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def working(self, step: int, attempt: int) -> str:
        return str(Name(step, attempt, Kind.PLAIN))

    def committed(self) -> dict[int, str]:
        found: dict[int, tuple[int, str]] = {}
        for directory in self._plain():
            name = parse(directory)
            if name is None or name.attempt is None or not self._has(directory, COMMITTED):
                continue
            if name.step not in found or found[name.step][0] < name.attempt:
                found[name.step] = (name.attempt, directory)
        return {step: directory for step, (_, directory) in found.items()}

    def publish(self, working: str, manifest_sha256: str) -> str:
        self.replace(working, COMMITTED, json.dumps({"manifest": manifest_sha256}).encode())
        return working

    def marker(self, committed: str) -> str | None:
        with self.open_read(committed, COMMITTED) as stream:
            data = stream.read(4096)
        try:
            return str(json.loads(data)["manifest"])
        except (ValueError, KeyError, TypeError):
            return ""

    def withdraw(self, committed: str, attempt: int) -> str:
        self._fs.rm(self._key(committed, COMMITTED))
        return committed

    def set_aside(self, committed: str, attempt: int, reason: str) -> str:
        self.replace(committed, BAD, json.dumps({"reason": reason}).encode())
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._key(committed, COMMITTED))
        return committed

    def leftovers(self) -> list[str]:
        return [d for d in self._plain() if not self._has(d, COMMITTED) and not self._has(d, BAD)]

    def bad(self) -> list[str]:
        return [d for d in self._plain() if not self._has(d, COMMITTED) and self._has(d, BAD)]

    def _plain(self) -> list[str]:
        return [d for d in self.directories() if (n := parse(d)) and n.attempt is not None and n.kind is Kind.PLAIN]

    def _has(self, directory: str, name: str) -> bool:
        return bool(self._fs.exists(self._key(directory, name)))

    def _key(self, directory: str, name: str = "") -> str:
        return "/".join(part for part in (self._base, directory, name) if part)
