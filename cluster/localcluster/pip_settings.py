"""What pip is told on this machine (its configuration and PIP_* variables), told to the pip inside an image build.

A wheel folder or CA bundle of this machine is bound into the build below /run/trireme-build, and a small pip.conf
that points there to /etc/pip.conf. No content of it stays in the image, and Dockerfiles need to know nothing of it.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Mapping, Tuple
from urllib.parse import unquote, urlparse

from .report import ClusterError
from .shell import run

# What decides where packages come from and whether to trust it; other settings are the user's own taste.
CARRIED = (
    "cert",
    "client-cert",
    "extra-index-url",
    "find-links",
    "index-url",
    "no-index",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
)
PATHS = ("cert", "client-cert", "extra-index-url", "find-links", "index-url")
LISTS = ("extra-index-url", "find-links", "trusted-host")
# Other programs than pip find the CA bundle by these, where a Dockerfile passes them on.
CA_VARIABLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


# Never the machine's own path: a bundle bound over /etc/ssl/certs would break the ca-certificates package in the image.
INSIDE = "/run/trireme-build"


@dataclass(frozen=True)
class PipSettings:
    """settings: pip options as the build sees them. mounts: (path of this machine, path in the build), read-only."""

    settings: Dict[str, List[str]] = field(default_factory=dict)
    mounts: List[Tuple[str, str]] = field(default_factory=list)

    def pip_conf(self) -> str:
        lines = ["[global]"]
        for name, values in sorted(self.settings.items()):
            lines.append(
                f"{name} =" + (f" {values[0]}" if len(values) == 1 else "".join(f"\n    {value}" for value in values))
            )
        return "\n".join(lines) + "\n"

    def build_arguments(self) -> Dict[str, str]:
        """PIP_* (and CA bundle) values for Dockerfiles that declare them with ARG."""
        arguments = {
            "PIP_" + name.upper().replace("-", "_"): " ".join(values) for name, values in self.settings.items()
        }
        if "cert" in self.settings:
            arguments.update(dict.fromkeys(CA_VARIABLES, self.settings["cert"][0]))
        return arguments


def parse_config_list(text: str) -> Dict[str, List[str]]:
    """Options of `pip config list` (lines `where.option='value'`); what comes later in pip's order wins, lists join."""
    found: Dict[str, List[str]] = {}
    for line in text.splitlines():
        name, equals, quoted = line.partition("=")
        where, _, option = name.strip().rpartition(".")
        # `install.` and `wheel.` sections speak of one command only; a build runs just these.
        if not equals or option not in CARRIED or where not in ("global", "install", ":env:"):
            continue
        try:
            value = "".join(shlex.split(quoted))
        except ValueError:
            continue
        values = value.replace("\\n", "\n").split() if option in LISTS else [value]
        if option in LISTS:
            found.setdefault(option, [])
            found[option] += [entry for entry in values if entry not in found[option]]
        elif where == ":env:" or option not in found or where == "install":
            found[option] = values
    return {option: values for option, values in found.items() if values and values != [""]}


def local_path(value: str) -> str:
    """The path of this machine that a value names, or "" when it is a URL of elsewhere."""
    if value.startswith("file:"):
        return unquote(urlparse(value).path)
    return value if value.startswith("/") else ""


def from_options(options: Mapping[str, List[str]]) -> PipSettings:
    """Settings with the folders and files that they need; a missing one is left out, as pip itself would skip it."""
    settings: Dict[str, List[str]] = {}
    mounts: Dict[str, str] = {}
    for option, values in options.items():
        for value in values:
            path = local_path(os.path.expanduser(value)) if option in PATHS else ""
            if path and not Path(path).exists():
                continue
            if path:
                outside = _mount_point(path)
                inside = mounts.setdefault(outside, f"{INSIDE}/{len(mounts)}")
                value = ("file://" if value.startswith("file:") else "") + inside + path[len(outside) :]
            settings.setdefault(option, []).append(value)
    return PipSettings(settings, sorted(mounts.items()))


def _mount_point(path: str) -> str:
    """The folder to bind for a path: an index's links may point beside it (`simple/` to `../packages`)."""
    found = Path(path.rstrip("/"))
    return str(found.parent if found.is_dir() and found.name == "simple" and len(found.parts) > 2 else found)


def of_this_machine() -> PipSettings:
    """Ask pip itself, so that every configuration file and variable that it honours counts."""
    for python in ("python3", "/usr/bin/python3"):
        try:
            return from_options(parse_config_list(run([python, "-m", "pip", "config", "list"])))
        except ClusterError:
            continue
    variables = "".join(
        f":env:.{name[4:].lower().replace('_', '-')}={shlex.quote(value)}\n"
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    )
    return from_options(parse_config_list(variables))
