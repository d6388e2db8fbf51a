"""Image archives: writing a one-layer OCI archive, and reading names and digests out of one. No image tool needed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .report import ClusterError

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def write(path: Path, name: str, layer: bytes, *, entrypoint: Sequence[str] = (), env: Sequence[str] = ()) -> str:
    """Write a one-layer OCI archive (layer: uncompressed tar); same input, same bytes. Returns its digest."""
    packed = gzip.compress(layer, compresslevel=6, mtime=0)
    config = {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": list(env), **({"Entrypoint": list(entrypoint)} if entrypoint else {})},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        "history": [{"created_by": "trireme local cluster"}],
    }
    blobs = [packed, _json(config)]
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **_reference(blobs[1])},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **_reference(packed)}],
        }
    )
    index = _json(
        {
            "schemaVersion": 2,
            "manifests": [
                {"mediaType": MANIFEST, **_reference(manifest), "annotations": {REF_NAME: name, CONTAINERD_NAME: name}}
            ],
        }
    )
    files: List[Tuple[str, bytes]] = [("oci-layout", _json({"imageLayoutVersion": "1.0.0"})), ("index.json", index)]
    files += [(f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob) for blob in (*blobs, manifest)]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    with tarfile.open(scratch, "w") as sink:
        for file, content in files:
            sink.addfile(tar_entry(file, len(content)), io.BytesIO(content))
    scratch.rename(path)
    return _digest(manifest)


def tar_entry(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    """A regular file of root's, dated 1970, so that archives are reproducible."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, mode
    return entry


def images(path: Path) -> Dict[str, Optional[str]]:
    """Image names in an archive with their digests; the digest is None where the format tells none (docker save).

    Raises ClusterError when the file is no image archive or holds an image without a name.
    """
    try:
        with tarfile.open(path) as source:
            names = source.getnames()
            if "index.json" in names:
                found = _from_index(_member(source, "index.json"))
            elif "manifest.json" in names:
                found = {tag: None for entry in _member(source, "manifest.json") for tag in entry.get("RepoTags") or []}
            else:
                raise ClusterError(f"{path} is not an image archive: it holds neither index.json nor manifest.json")
    except FileNotFoundError as error:
        raise ClusterError(f"image archive {path} does not exist") from error
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ClusterError(f"{path} is not an image archive: {str(error).splitlines()[0]}") from error
    if not found:
        raise ClusterError(
            f"{path} names no image: make it with `buildah push IMAGE oci-archive:FILE:NAME` or `docker save NAME`"
        )
    return found


def _from_index(index: Any) -> Dict[str, Optional[str]]:
    found: Dict[str, Optional[str]] = {}
    for manifest in index["manifests"]:
        notes = manifest.get("annotations") or {}
        # Docker writes the full name as containerd's own annotation and only the tag as the OCI one.
        name = notes.get(CONTAINERD_NAME) or notes.get(REF_NAME)
        if name:
            found[name] = manifest["digest"]
    return found


def _member(source: tarfile.TarFile, name: str) -> Any:
    stream = source.extractfile(name)
    if stream is None:
        raise ValueError(f"{name} is no file")
    return json.load(stream)


def architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _reference(data: bytes) -> Dict[str, Any]:
    return {"digest": _digest(data), "size": len(data)}
