"""Prints the pinned third-party requirements of one image, from pyproject.toml: `requirements.py operator`.

Its output, not pyproject.toml, is what the dependency layer of an image is made from: a change of a linter setting or
of the project's code leaves that layer alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extra: str) -> list[str]:
    """The base dependencies and those of the extra, sorted."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    if extra not in extras:
        raise SystemExit(f"requirements.py: no extra {extra!r} in {pyproject}; there are {', '.join(extras)}")
    return sorted({*project["dependencies"], *extras[extra]})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: requirements.py EXTRA")
    print("\n".join(requirements(Path(__file__).resolve().parents[1] / "pyproject.toml", sys.argv[1])))
