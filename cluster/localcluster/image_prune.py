"""Keeping buildah's store as small as it can be without building anything heavy twice.

Each new content of an image is a new tag, and each step of each build a layer; nothing of it goes away by itself. The
newest tags of a name are kept with the steps that they were built by, which hold the heavy layers; what only older ones
or broken-off builds used is removed.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, Protocol, Sequence

from .report import ClusterError, say
from .shell import run

KEEP = 2
"""Tags of one name: two, so that going back and forth between two states of the project stays cheap."""


class Store(Protocol):
    def command(self, verb: str, *arguments: str) -> List[str]:
        """The command line of one of buildah's verbs on this store."""


def repository(tag: str) -> str:
    head, _, last = tag.rpartition("/")
    return f"{head}/{last.split(':')[0]}" if head else last.split(":")[0]


def outdated(images: Sequence[Dict[str, Any]], tag: str, keep: int = KEEP) -> List[str]:
    """Names of the repository of `tag` beyond the newest `keep`, of which `tag` is one. `images` as buildah lists."""
    found = {name: image["createdatraw"] for image in images for name in image.get("names") or []}
    others = sorted((n for n in found if repository(n) == repository(tag) and n != tag), key=lambda n: found[n])
    return others[: max(len(others) - (keep - 1), 0)]


def prune(store: Store, tag: str) -> None:
    """After `tag` was built: removes older ones of its name, then whatever no named image needs any more.

    A store that cannot be pruned (somebody builds in it) is no reason for the build to fail.
    """
    try:
        for container in json.loads(run(store.command("containers", "--json")) or "null") or []:
            run(store.command("rm", container["id"]))
        old = outdated(json.loads(run(store.command("images", "--json")) or "null") or [], tag)
        if old:
            run(store.command("rmi", *old))
        run(store.command("rmi", "--prune"))
    except ClusterError as error:
        say(f"  note: the image store was not pruned: {error}")
