"""The pause image: one static program in an image made from nothing, since no registry can be counted on."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path

from . import archive
from .node_config import PAUSE_IMAGE
from .paths import cache_dir
from .shell import run

SOURCE = Path(__file__).with_name("pause.c")


def image() -> Path:
    """Archive of the pause image, compiled once and cached by its source."""
    key = hashlib.sha256(SOURCE.read_bytes() + PAUSE_IMAGE.encode()).hexdigest()[:12]
    target = cache_dir() / "images" / f"pause-{key}.tar"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "pause"
        run(["gcc", "-Os", "-static", "-s", "-Wall", "-Werror", "-o", str(program), str(SOURCE)])
        content = program.read_bytes()
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as sink:
        sink.addfile(archive.tar_entry("pause", len(content), 0o755), io.BytesIO(content))
    archive.write(target, PAUSE_IMAGE, layer.getvalue(), entrypoint=["/pause"])
    return target
