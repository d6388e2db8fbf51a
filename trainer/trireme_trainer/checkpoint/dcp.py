"""torch.distributed.checkpoint on a checkpoint root: files are hashed while written, and nothing is executed when read.

The files are torch's own (`.metadata`, `__<rank>_0.distcp`), so its tools can open a committed checkpoint. Its reader
would unpickle `.metadata` freely; ours builds only the handful of plain classes that a tensor checkpoint consists of.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Collection, Generator
from typing import IO, Any, cast

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from trireme_trainer.checkpoint.errors import CheckpointError, DamagedCheckpoint, IncompatibleCheckpoint, SaveFailed
from trireme_trainer.checkpoint.files import Files
from trireme_trainer.checkpoint.layout import METADATA
from trireme_trainer.checkpoint.manifest import FileEntry
from trireme_trainer.checkpoint.ranks import Ranks, describe
from trireme_trainer.checkpoint.staging import Staged, StagedPlanner

# A single process without torch.distributed is a normal case here, not a mistake to warn about at each save.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_CLASSES = {
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "StorageMeta",
    "_MEM_FORMAT_ENCODING",
}  # fmt: skip


def write(
    files: Files, directory: str, staged: Staged, ranks: Ranks, on_stage: Callable[[str], None]
) -> list[FileEntry]:
    """Writes this rank's share into `directory` and returns the files it made. Collective; raises on all ranks."""
    disk = _HashedFiles(files, directory, on_stage)
    writer = _Writer(disk, directory)
    planner = StagedPlanner(staged)
    try:
        save({}, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.group is None)
    except CheckpointException as error:
        raise SaveFailed(describe(error)) from None
    return disk.written


def read_metadata(files: Files, directory: str, names: Collection[str]) -> Metadata:
    """Raises DamagedCheckpoint unless it is the metadata of a tensor checkpoint with its data in the files `names`."""
    try:
        with files.open_read(directory, METADATA) as stream:
            metadata = _MetadataUnpickler(stream).load()
    except OSError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"{METADATA} is unreadable ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise DamagedCheckpoint(f"{METADATA} is not the metadata of a checkpoint")
    for index, info in metadata.storage_data.items():
        if info.relative_path not in names:
            where = f"{info.relative_path!r}, which the manifest does not list"
            raise DamagedCheckpoint(f"{METADATA} places {index.fqn} in {where}")
        if getattr(info, "transform_descriptors", None):
            raise DamagedCheckpoint(f"{METADATA} asks for stream transforms, which are not used here")
    return metadata


def check_compatible(tensors: dict[str, Tensor], metadata: Metadata, *, strict: bool = True) -> None:
    """Raises IncompatibleCheckpoint naming tensors that are missing, unexpected (if strict), of other shape or type."""
    stored = metadata.state_dict_metadata
    wrong = [f"{name} is missing" for name in tensors if name not in stored]
    if strict:
        wrong += [f"{name} is not part of this job" for name in stored if name not in tensors]
    for name, tensor in tensors.items():
        have = stored.get(name)
        if have is None:
            continue
        if not isinstance(have, TensorStorageMetadata):
            wrong.append(f"{name} is not a tensor")
        elif tuple(have.size) != tuple(tensor.shape):
            wrong.append(f"{name} is {list(have.size)}, this job needs {list(tensor.shape)}")
        elif have.properties.dtype != tensor.dtype:
            wrong.append(f"{name} is {have.properties.dtype}, this job needs {tensor.dtype}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise IncompatibleCheckpoint("; ".join(wrong[:4]) + more)


def read(files: Files, directory: str, tensors: dict[str, Tensor], metadata: Metadata, ranks: Ranks) -> None:
    """Fills `tensors` (DTensors: each rank its own part) in place, whatever world size wrote them. Collective."""
    reader = _Reader(_HashedFiles(files, directory), directory, metadata)
    try:
        load(tensors, storage_reader=reader, planner=_Planner(), process_group=ranks.group, no_dist=ranks.group is None)
    except CheckpointException as error:  # not an Exception, and the same on every rank
        damaged = any(isinstance(wrapped[0], DamagedCheckpoint) for wrapped in error.failures.values())
        raise (DamagedCheckpoint if damaged else CheckpointError)(describe(error)) from None


class _HashingStream(io.RawIOBase):
    """Write-only and forward-only, so that what was hashed is what is in the file."""

    def __init__(self, inner: IO[bytes], on_stage: Callable[[str], None]) -> None:
        super().__init__()
        self._inner = inner
        self._digest = hashlib.sha256()
        self._size = 0
        self._on_stage = on_stage
        self.error: OSError | None = None
        """The first one. torch's zip writer stumbles over it and reports its own confusion instead."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._inner.write(view)
            if self._size == 0 and len(view):
                self._inner.flush()
                self._on_stage("writing")
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def entry(self, name: str) -> FileEntry:
        return FileEntry(name, self._size, self._digest.hexdigest())


class _HashedFiles(FileSystemBase):
    """What torch's reader and writer see of one checkpoint directory."""

    def __init__(self, files: Files, directory: str, on_stage: Callable[[str], None] | None = None) -> None:
        self._files = files
        self._directory = directory
        self._on_stage = on_stage or (lambda _stage: None)
        self.written: list[FileEntry] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        name = self._name(path)
        if mode == "rb":
            with self._files.open_read(self._directory, name) as stream:
                yield cast(io.IOBase, stream)
            return
        # Written under its final name at once: it is the directory, not the file, that is renamed when all is well.
        name = name.removesuffix(".tmp")
        with self._files.create(self._directory, name) as inner:
            hashing = _HashingStream(inner, self._on_stage)
            try:
                yield hashing
            except Exception as error:
                raise hashing.error or error from None
        self.written.append(hashing.entry(name))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        if self._name(path) != f"{self._name(new_path)}.tmp":
            raise OSError(f"unexpected rename of {path} to {new_path}")

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """The coordinator has made it."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return False  # a directory to write into is always new

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        raise OSError(f"unexpected removal of {path}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _name(self, path: str | os.PathLike[str]) -> str:
        return os.fspath(path).rsplit("/", 1)[-1]


class _Writer(FileSystemWriter):
    def __init__(self, disk: _HashedFiles, directory: str) -> None:
        # copy-ahead is for tensors on a GPU; these are staged, and a background thread must not open a CUDA context.
        super().__init__(directory, sync_files=False, thread_count=1, per_thread_copy_ahead=0, overwrite=False)
        self.fs = disk  # type: ignore[assignment]
        self.path = directory

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no absolute path in the files: a checkpoint can be copied elsewhere


class _Reader(FileSystemReader):
    def __init__(self, disk: _HashedFiles, directory: str, metadata: Metadata) -> None:
        super().__init__(directory)
        self.fs = disk  # type: ignore[assignment]
        self.path = directory
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise DamagedCheckpoint(f"{read_item.dest_index.fqn} is a pickled object; only tensors are loaded")


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP metadata, torch's dtypes and layouts, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python before 3.11.4 pickles a member of an enum
        allowed = (
            (module == _METADATA_MODULE and name in _METADATA_CLASSES)
            or (module == "torch.distributed.checkpoint.filesystem" and name == "_StorageInfo")
            or (module == "torch" and name == "Size")
            or (module == "torch.serialization" and name == "_get_layout")
            or (module == "torch" and _is_dtype(name))
        )
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    """`getattr` for members of the one enum of DCP metadata; anything else could reach further."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"attribute {name!r} has no place in a checkpoint")
    return _MEM_FORMAT_ENCODING[name]


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)
