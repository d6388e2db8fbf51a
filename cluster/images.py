#!/usr/bin/env python3
"""Build container images with what is there, with or without a registry: `images.py build DIR/Dockerfile --tag T`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))

from localcluster import image_build
from localcluster.report import ClusterError, say


def build_arguments(pairs: List[str]) -> Dict[str, str]:
    """`NAME=VALUE` words as a mapping."""
    for pair in pairs:
        if "=" not in pair:
            raise ClusterError(f"--build-arg {pair!r}: write it as NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="images.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build one Dockerfile")
    build.add_argument("dockerfile", type=Path)
    build.add_argument("--tag", required=True)
    build.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    build.add_argument("--context", type=Path, help="build context (default: the Dockerfile's folder)")
    build.add_argument("--output", type=Path, help="write an archive for `cluster.py load-image`")
    build.add_argument("--push", action="store_true", help="push it to the registry that its tag names")
    commands.add_parser("base", help="make the base image that needs no registry, and print its name")
    commands.add_parser("builder", help="print which builder is used: docker or buildah")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "base":
            facts = {"tag": image_build.Buildah().base()}
        elif arguments.command == "builder":
            facts = {"builder": image_build.builder()}
        else:
            facts = image_build.build(
                arguments.dockerfile,
                arguments.tag,
                arguments.output,
                build_arguments(arguments.build_arg),
                arguments.context,
                arguments.push,
            )
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(facts.get("tag") or facts["builder"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
