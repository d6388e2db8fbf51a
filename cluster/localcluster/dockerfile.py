"""The little that must be known about a Dockerfile before building it: arguments and first base image. Pure."""

from __future__ import annotations

import re
from typing import Dict, List, Mapping, Optional


def arguments(text: str) -> Dict[str, Optional[str]]:
    """Declared build arguments with their defaults (None without one)."""
    found: Dict[str, Optional[str]] = {}
    for line in _instructions(text):
        match = re.match(r"ARG\s+(.*)", line, re.IGNORECASE)
        if match:
            for word in match.group(1).split():
                name, equals, value = word.partition("=")
                found[name] = value.strip("\"'") if equals else found.get(name)
    return found


def base_argument(text: str) -> Optional[str]:
    """Name of the build argument that is the whole of a FROM line (`FROM ${BASE_IMAGE}`), if there is one."""
    for line in _instructions(text):
        match = re.match(r"FROM\s+(?:--\S+\s+)*\$\{?(\w+)\}?(\s|$)", line, re.IGNORECASE)
        if match:
            return match.group(1)
    return None


def registry(image: str) -> str:
    """Host that an image name is pulled from; Docker's hub when it names none."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first
    return "registry-1.docker.io"


def used(declared: Mapping[str, Optional[str]], offered: Mapping[str, str]) -> Dict[str, str]:
    """Those of the offered values that the Dockerfile asks for."""
    return {name: value for name, value in offered.items() if name in declared}


def _instructions(text: str) -> List[str]:
    joined = re.sub(r"\\\n", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]
