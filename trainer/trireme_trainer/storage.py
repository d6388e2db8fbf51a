"""Where a path of a recipe really is: a mounted claim, a local path, or a filesystem behind a URL."""

from __future__ import annotations

import os
import re
from typing import Any

from trireme_api.protocol import PVC_ROOT, Env

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_CLAIM = re.compile(r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")


class StorageError(ValueError):
    """A path that cannot be used; the text names it and what would be right."""


def resolve_path(uri: str) -> str:
    """The absolute local path of `pvc://claim/dir`, `file://` or a plain path; any other URL comes back unchanged.

    A claim is looked for under $TRIREME_PVC_ROOT (default /mnt/pvc), where the operator mounts it. The claim must
    be there, the directory inside it need not be (a checkpoint directory is made by the first save).
    Raises StorageError for a malformed URI or a claim that is not mounted.
    """
    if not uri:
        raise StorageError("empty path: give pvc://claim/dir, a URL, or a local path")
    match = _SCHEME.match(uri)
    scheme = match.group(1).lower() if match else ""
    if scheme == "pvc":
        return _claim_path(uri)
    if scheme in ("file", "local"):
        return os.path.abspath(uri.split("://", 1)[1])
    if scheme:
        return uri
    return os.path.abspath(os.path.expanduser(uri))


def is_local(uri: str) -> bool:
    """Whether `resolve_path(uri)` is a path of this machine."""
    match = _SCHEME.match(uri)
    return match is None or match.group(1).lower() in ("pvc", "file", "local")


def check_driver(uri: str) -> None:
    """Raises StorageError where nothing installed here reads the URL's scheme; nobody else is asked."""
    import fsspec

    scheme = uri.partition("://")[0]
    if is_local(uri):
        return
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise StorageError(f"{uri}: the filesystem driver of this URL is not installed ({error})") from None
    except ValueError:
        raise StorageError(f"{uri}: no scheme is called {scheme!r}; write e.g. pvc://, s3:// or gs://") from None


def open_filesystem(uri: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) for any URI. Raises StorageError when the driver for the scheme is missing."""
    import fsspec

    check_driver(uri)
    try:
        filesystem, path = fsspec.core.url_to_fs(resolve_path(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: {error}") from None
    return filesystem, path


def _claim_path(uri: str) -> str:
    claim, _, inside = uri.split("://", 1)[1].partition("/")
    if not _CLAIM.match(claim):
        raise StorageError(f"{uri}: {claim!r} is not the name of a PersistentVolumeClaim; write pvc://claim/dir")
    parts = [part for part in inside.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise StorageError(f"{uri}: '..' may not be used inside a claim")
    root = os.environ.get(Env.PVC_ROOT) or PVC_ROOT
    mount = os.path.join(os.path.abspath(root), claim)
    if not os.path.isdir(mount):
        raise StorageError(
            f"{uri}: claim {claim!r} is not mounted at {mount}; create the claim in the job's namespace "
            f"(outside a cluster: set {Env.PVC_ROOT} to a directory that holds {claim!r})"
        )
    return os.path.join(mount, *parts)
