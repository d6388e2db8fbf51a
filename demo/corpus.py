"""A few megabytes of real prose: Debian's own manuals, from its packages, as plain text files."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo.report import DemoError

# Package → its manuals as plain text: whole books, and the chapters of one before they became HTML.
MANUALS = {
    "debian-reference-en": ("debian-reference.en.txt.gz",),
    "debian-policy": (
        "policy.txt.gz",
        "copyright-format-1.0.txt.gz",
        "debconf_specification.txt.gz",
        "perl-policy.txt.gz",
    ),
    "developers-reference": ("*.rst.txt",),
}
PACKAGES = tuple(MANUALS)
LEAST_BYTES = 1_000_000
OWN = "TRIREME_CORPUS"


def corpus() -> Path:
    """Directory of plain text files, fetched once. `TRIREME_CORPUS` names a directory of your own texts instead."""
    own = os.environ.get(OWN)
    if own:
        if not any(path.is_file() for path in Path(own).glob("*.txt")):
            raise DemoError(f"{OWN}={own}: holds no .txt file; name a directory of plain text files")
        return Path(own)
    cache = Path(os.environ.get("TRIREME_CACHE") or Path.home() / ".cache" / "trireme") / "corpus" / "debian-manuals"
    if not (cache / ".complete").exists():
        fetch(cache)
    return cache


def fetch(target: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise DemoError(
            f"the corpus comes from Debian packages and there is no apt-get; set {OWN} to a directory of .txt files"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        download(folder)
        texts = folder / "texts"
        texts.mkdir()
        for package in sorted(folder.glob("*.deb")):
            book, tree = package.name.split("_")[0], folder / package.stem
            subprocess.run(["dpkg-deb", "--extract", str(package), str(tree)], check=True)
            for path in sorted({p for pattern in MANUALS[book] for p in tree.rglob(pattern) if p.is_file()}):
                name = f"{book}--{path.name.removesuffix('.gz').removesuffix('.rst.txt').removesuffix('.txt')}.txt"
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                (texts / name).write_bytes(data)
        total = sum(path.stat().st_size for path in texts.iterdir())
        if total < LEAST_BYTES:
            raise DemoError(
                f"{', '.join(PACKAGES)} hold only {total} bytes of text; set {OWN} to a directory of .txt files"
            )
        (texts / ".complete").touch()
        shutil.rmtree(target, ignore_errors=True)
        texts.rename(target)


def download(folder: Path, packages: Sequence[str] = PACKAGES) -> None:
    """`apt-get download` checks the archive's signatures and installs nothing; stale package lists are renewed once."""
    command = ["apt-get", "download", "-q", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["no reason given"]
        raise DemoError(f"no {', '.join(packages)}: {lines[0]}; set {OWN} to a directory of .txt files")
