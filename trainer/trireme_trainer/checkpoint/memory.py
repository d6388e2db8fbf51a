"""One pod's folder of shards in memory: what a file looks like, and how it is known to be whole.

    tensors, each at a multiple of 64 bytes | header (JSON) | magic, length and SHA-256 of the header (48 bytes)

The end is written last and holds, through the header, the SHA-256 of the tensors: a torn file has no valid end. A file
is written under a working name and renamed when it is whole, so a kill leaves the shards before it untouched. The
folder lies on tmpfs (an emptyDir in memory): it outlives the ranks and not the pod. Raw bytes and JSON, never pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trireme_api.protocol import Env
from trireme_api.shards import Shard, parse_shard

from trireme_trainer.checkpoint import fence as fences
from trireme_trainer.checkpoint.errors import CheckpointError, DamagedCheckpoint
from trireme_trainer.checkpoint.fence import Fence
from trireme_trainer.checkpoint.files import PosixFiles

FORMAT = 1
ALIGN = 64
MAGIC = b"TRISHARD"
_END = struct.Struct("<8sQ32s")
MAX_HEADER = 64 * 2**20


@dataclass(frozen=True)
class Place:
    """Where one tensor of a shard lies and what it is a part of; equal places hold the same numbers of a model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the part this rank holds."""
    whole: tuple[int, ...]
    spread: str
    """Mesh and placements of a sharded tensor; empty for one that every rank has whole."""
    offset: int
    """Bytes from the beginning of the file."""
    size: int


@dataclass(frozen=True)
class Header:
    owner: str
    step: int
    attempt: int
    world: int
    rank: int
    layout: tuple[Place, ...]
    size: int
    """Bytes of the tensors."""
    sha256: str
    """Hex, of the tensors."""
    meta: Mapping[str, Any]

    @property
    def shard(self) -> Shard:
        return Shard(self.step, self.attempt, self.world, self.rank)


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[Place, ...]:
    """Places of what this rank holds of `tensors` (DTensors: its own part), in their order."""
    places = []
    offset = 0
    for name, tensor in tensors.items():
        part, spread = _part(tensor), ""
        if isinstance(tensor, DTensor):
            spread = f"{tuple(tensor.device_mesh.shape)} {tensor.placements}"
        place = Place(name, str(part.dtype), tuple(part.shape), tuple(tensor.shape), spread, offset, part.nbytes)
        places.append(place)
        offset += -(-part.nbytes // ALIGN) * ALIGN
    return tuple(places)


def payload_size(layout: tuple[Place, ...]) -> int:
    return layout[-1].offset + layout[-1].size if layout else 0


@dataclass
class Draft:
    """A file being written under its working name; `body` is mapped, so writing to it is writing the file."""

    path: str
    body: Tensor
    """The tensors: [n] uint8."""
    end: bytes = b""
    """Header and end, once they are known."""

    def finish(self, end: bytes) -> None:
        self.end = end
        with open(self.path, "ab") as file:
            file.write(end)


class MemoryFolder:
    """Shards of one job in one pod; several ranks of the pod share it."""

    def __init__(self, path: str, *, attempt: int, owner: str = "") -> None:
        self.path = path
        self.owner = owner
        self._attempt = attempt
        self._files = PosixFiles(path)
        self._fence: Fence | None = None
        self._mappings: dict[int, Tensor] = {}
        """By inode: of files that this rank has written and may write again."""

    def claim(self) -> None:
        """Fences older attempts off. Raises StaleAttempt, or CheckpointError for a folder that cannot be used."""
        if not self.path:
            raise CheckpointError(f"{Env.MEMORY_DIR} names no folder in memory")
        try:
            self._fence = fences.claim(self._files, self._attempt, self.owner)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def shards(self) -> list[Shard]:
        return sorted(shard for name in os.listdir(self.path) if (shard := parse_shard(name)))

    def file(self, shard: Shard) -> str:
        return os.path.join(self.path, str(shard))

    # --- writing ---

    def draft(self, key: str, size: int) -> Draft:
        """A file of `size` bytes to be written; `key` tells writers of this folder apart. Raises OSError (ENOSPC).

        The file that the writer retired last is used again, mapping and all: fresh pages cost more than the copy does.
        """
        path = os.path.join(self.path, f"working-{key}")
        if not os.path.exists(path):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._spare(key), path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            found = os.fstat(descriptor)
            mapped = self._mappings.pop(found.st_ino, None)
            os.ftruncate(descriptor, size)
            if mapped is None or mapped.numel() != size or found.st_size < size:
                if size:
                    # A mapped write into a full tmpfs would kill the process; so its memory is taken now.
                    os.posix_fallocate(descriptor, 0, size)
                mapped = _mapped(path, size)
        finally:
            os.close(descriptor)
        self._mappings[found.st_ino] = mapped
        return Draft(path, mapped)

    def stage(self, key: str, tensors: Mapping[str, Tensor]) -> tuple[Draft, tuple[Place, ...]]:
        """Copies what this rank holds into a new draft; later changes of the tensors are not seen."""
        layout = layout_of(tensors)
        draft = self.draft(key, payload_size(layout))
        devices = set()
        with torch.no_grad():
            for place, tensor in zip(layout, tensors.values(), strict=True):
                live = _part(tensor)
                if place.size:
                    _view(draft.body, place).copy_(live, non_blocking=live.is_cuda)
                if live.is_cuda:
                    devices.add(live.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return draft, layout

    def seal(self, draft: Draft, shard: Shard, layout: tuple[Place, ...], meta: Mapping[str, Any]) -> None:
        """Hashes the tensors and writes header and end."""
        header = Header(
            owner=self.owner, step=shard.step, attempt=shard.attempt, world=shard.world, rank=shard.rank,
            layout=layout, size=draft.body.numel(), sha256=_sha256(draft.body), meta=meta,
        )  # fmt: skip
        text = json.dumps({"format": FORMAT, **asdict(header)}, separators=(",", ":"), allow_nan=False).encode()
        draft.finish(text + _END.pack(MAGIC, len(text), hashlib.sha256(text).digest()))

    def publish(self, draft: Draft, shard: Shard) -> None:
        """From here on the shard is there. Raises StaleAttempt when a newer attempt has claimed the folder."""
        assert self._fence is not None, "claim() comes first"
        with self._files.lock():
            fences.check(self._files, self._fence)
            os.rename(draft.path, self.file(shard))

    def retire(self, gone: Callable[[Shard], bool], key: Callable[[Shard], str] | None = None) -> None:
        """Removes shards; with `key` the file is kept as that writer's spare, if it has none."""
        for shard in self.shards():
            if not gone(shard):
                continue
            spare = self._spare(key(shard)) if key is not None else None
            with contextlib.suppress(FileNotFoundError):
                if spare is not None and not os.path.exists(spare):
                    os.rename(self.file(shard), spare)
                else:
                    # A mapping would keep the memory of a removed file taken.
                    self._mappings.pop(os.stat(self.file(shard)).st_ino, None)
                    os.unlink(self.file(shard))

    def sweep(self) -> None:
        """Removes what writers of earlier attempts left half done. Only while nobody writes here."""
        for name in os.listdir(self.path):
            if name.startswith(("working-", "spare-")):
                os.unlink(os.path.join(self.path, name))

    def _spare(self, key: str) -> str:
        return os.path.join(self.path, f"spare-{key}")

    # --- reading ---

    def verify(self, shard: Shard, draft: Draft | None = None) -> Header:
        """Reads every byte of the shard (`draft`: of one that is not published yet). Raises DamagedCheckpoint saying
        what is wrong, or OSError."""
        path = draft.path if draft else self.file(shard)
        header = read_header(path)
        if header.shard != shard:
            raise DamagedCheckpoint(f"{path}: holds {header.shard}")
        if header.owner != self.owner:
            raise DamagedCheckpoint(f"{path}: is of another job ({header.owner or 'unnamed'})")
        found = _sha256(draft.body[: header.size] if draft else _mapped(path, header.size))
        if found != header.sha256:
            raise DamagedCheckpoint(f"{path}: content changed: sha256 {found[:12]}…, was {header.sha256[:12]}…")
        return header

    def content(self, shard: Shard) -> Tensor:
        """The whole file: [n] uint8, mapped. Raises OSError."""
        path = self.file(shard)
        return _mapped(path, os.stat(path).st_size)

    def fill(self, shard: Shard, header: Header, tensors: Mapping[str, Tensor]) -> None:
        """Copies a verified shard into `tensors`, whose layout must be the shard's."""
        content = _mapped(self.file(shard), header.size)
        with torch.no_grad():
            for place, tensor in zip(header.layout, tensors.values(), strict=True):
                if place.size:
                    _part(tensor).copy_(_view(content, place))


def read_header(path: str) -> Header:
    """Raises DamagedCheckpoint for a file that is torn or not a shard, OSError for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            total = file.seek(0, os.SEEK_END)
            if total < _END.size:
                raise DamagedCheckpoint(f"{path}: torn: {total} bytes")
            file.seek(total - _END.size)
            magic, length, digest = _END.unpack(file.read(_END.size))
            if magic != MAGIC or length > min(MAX_HEADER, total - _END.size):
                raise DamagedCheckpoint(f"{path}: torn: its end is missing")
            file.seek(total - _END.size - length)
            text = file.read(length)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing") from None
    if hashlib.sha256(text).digest() != digest:
        raise DamagedCheckpoint(f"{path}: header changed")
    try:
        body = json.loads(text)
        if body.pop("format") != FORMAT:
            raise DamagedCheckpoint(f"{path}: written by another version of trireme")
        layout = tuple(
            Place(**{**place, "shape": tuple(place["shape"]), "whole": tuple(place["whole"])})
            for place in body.pop("layout")
        )
        header = Header(layout=layout, **body)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: header lacks fields ({error})") from None
    if header.size != payload_size(layout) or header.size + length + _END.size != total:
        raise DamagedCheckpoint(f"{path}: {total} bytes, its header says otherwise")
    return header


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _mapped(path: str, size: int) -> Tensor:
    """[size] uint8. The file must be at least that long: it would be lengthened."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _view(content: Tensor, place: Place) -> Tensor:
    dtype = getattr(torch, place.dtype.removeprefix("torch."))
    return content[place.offset : place.offset + place.size].view(dtype).view(place.shape)


def _sha256(content: Tensor) -> str:
    return hashlib.sha256(cast(bytes, content.numpy())).hexdigest()
