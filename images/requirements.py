"""Prints the pinned third-party requirements of one image, from pyproject.toml: `requirements.py operator [tracing]`.

Its output, not pyproject.toml, is what the dependency layer of an image is made from: a change of a linter setting or
of the project's code leaves that layer alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, *wanted: str) -> list[str]:
    """The base dependencies and those of the extras, sorted."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    for extra in wanted:
        if extra not in extras:
            raise SystemExit(f"requirements.py: no extra {extra!r} in {pyproject}; there are {', '.join(extras)}")
    return sorted({*project["dependencies"], *(one for extra in wanted for one in extras[extra])})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: requirements.py EXTRA...")
    print("\n".join(requirements(Path(__file__).resolve().parents[1] / "pyproject.toml", *sys.argv[1:])))
