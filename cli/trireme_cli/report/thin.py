"""Shortens a step log to what a page can show. Standard library alone: the text of this file also runs in a pod.

Every event stays, and of each bucket of steps the first row and those of least and greatest loss, so that no spike
gets lost. Checkpoint events, which are many, stay until there are too many.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def thin(lines: Iterable[str], limit: int) -> Iterator[str]:
    """The lines that stay, in order; about `limit` rows of steps at most. `lines` is gone through twice."""
    steps = sum(1 for line in lines if '"event"' not in line)
    size = max(1, (3 * steps) // max(1, limit))
    events = 0
    bucket: list[tuple[dict[str, Any], str]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if not isinstance(row, dict):
            continue
        if "event" in row:
            events += row["event"] == "checkpoint"
            yield from chosen(bucket)
            bucket = []
            if row["event"] != "checkpoint" or events <= limit:
                yield line.rstrip("\n")
            continue
        bucket.append((row, line.rstrip("\n")))
        if len(bucket) >= size or row.get("spike") or row.get("skipped"):
            yield from chosen(bucket)
            bucket = []
    yield from chosen(bucket)


def chosen(bucket: list[tuple[dict[str, Any], str]]) -> list[str]:
    if len(bucket) <= 3:
        return [line for _, line in bucket]
    known = [i for i, (row, _) in enumerate(bucket) if isinstance(row.get("loss"), (int, float))] or [0]
    keep = {0, len(bucket) - 1}
    keep |= {
        min(known, key=lambda i: bucket[i][0].get("loss", 0)),
        max(known, key=lambda i: bucket[i][0].get("loss", 0)),
    }
    return [bucket[i][1] for i in sorted(keep)]


class Lines:
    """The lines of all files, as often as one likes, without holding them."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            with open(path, encoding="utf-8", errors="replace") as file:
                yield from file


def files(directory: str) -> list[str]:
    """The step log of a checkpoint directory: one growing file, or parts in the order in which they were written."""
    whole = os.path.join(directory, "metrics.jsonl")
    parts = glob.glob(os.path.join(glob.escape(directory), "metrics.attempt-*.part-*.jsonl"))
    parts.sort(key=lambda path: [int(word) if word.isdigit() else 0 for word in path.replace(".", "-").split("-")])
    return ([whole] if os.path.exists(whole) else []) + parts


def main(directory: str, limit: int) -> None:
    found = files(directory)
    if not found:
        sys.exit(f"no step log in {directory} yet")
    for line in thin(Lines(found), limit):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
