"""A prepared corpus behind a URL, brought to this machine once: memory maps need local files."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import MANIFEST, Manifest, file_sha256, parse_manifest
from trireme_trainer.storage import StorageError, is_local, open_filesystem, resolve_path

CACHE_ENV = "TRIREME_DATA_CACHE"


def cache_root() -> Path:
    """$TRIREME_DATA_CACHE, else a directory of this user in the temporary one (a pod's root is read-only)."""
    given = os.environ.get(CACHE_ENV)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"trireme-data-{os.getuid()}"


def local_copy(uri: str) -> str:
    """A local directory with the corpus at `uri`: itself when local, else a verified copy kept by fingerprint.

    Several ranks of a node may ask at once: one downloads, the others wait. Raises DataError or StorageError.
    """
    if is_local(uri):
        return resolve_path(uri)
    filesystem, base = open_filesystem(uri)
    where = f"{uri.rstrip('/')}/{MANIFEST}"
    try:
        text = filesystem.cat_file(f"{base.rstrip('/')}/{MANIFEST}")
    except FileNotFoundError:
        raise DataError(f"{where}: not there; make it with: trireme prepare, and upload the whole directory") from None
    except Exception as error:
        raise StorageError(f"{where}: cannot be read ({type(error).__name__}: {error})") from None
    manifest = parse_manifest(text, where)
    # The fingerprint says nothing of the language, and the manifest is kept as it was first seen.
    target = cache_root() / "-".join(filter(None, (manifest.fingerprint, manifest.language)))
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(target / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _download(filesystem, base.rstrip("/"), uri, manifest, target)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot keep a copy of {uri} ({error}); set {CACHE_ENV} to a directory with room"
        ) from None
    return str(target)


def _download(filesystem: object, base: str, uri: str, manifest: Manifest, target: Path) -> None:
    if (target / MANIFEST).exists():
        return
    for name, _, sha256 in manifest.files():
        final, partial = target / name, target / f"{name}.partial"
        if final.exists():
            continue
        try:
            filesystem.get_file(f"{base}/{name}", str(partial))  # type: ignore[attr-defined]
        except FileNotFoundError:
            raise DataError(f"{uri}: {name} is missing; upload the whole directory") from None
        if (found := file_sha256(str(partial))) != sha256:
            partial.unlink()
            raise DataError(f"{uri}: {name} is corrupt: sha256 is {found[:16]}…, the manifest says {sha256[:16]}…")
        os.replace(partial, final)
    partial = target / f"{MANIFEST}.partial"
    partial.write_text(manifest.to_text(), encoding="utf-8")
    os.replace(partial, target / MANIFEST)
