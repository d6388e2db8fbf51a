"""Where a report reads a step log from: this machine, a URL, or a training pod that has the claim mounted."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from trireme_api.layout import claim_of
from trireme_api.protocol import PVC_ROOT

from trireme_cli.kube import Kube, KubeProblem
from trireme_cli.report import thin
from trireme_cli.report.steplog import StepLog

SHOWN = 1500
"""Rows of steps on a page: more than a screen has pixels for, and small enough to send by mail."""
_URL = re.compile(r"^(?!pvc:|file:)[A-Za-z][A-Za-z0-9+.-]*://")


def read_directory(directory: str) -> StepLog:
    """Of a checkpoint directory on this machine. Raises OSError where there is none."""
    found = thin.files(directory)
    if not found:
        raise FileNotFoundError(2, "no step log (metrics.jsonl) here", directory)
    return StepLog.parse(thin.thin(thin.Lines(found), SHOWN))


def read_uri(uri: str) -> StepLog:
    """Of a checkpoint URI that can be read from here. Raises OSError."""
    if not _URL.match(uri):
        return read_directory(uri.removeprefix("file://"))
    from trireme_trainer.storage import open_filesystem

    filesystem, root = open_filesystem(uri)
    paths = [str(path) for path in filesystem.glob(f"{root}/metrics*.jsonl")]
    paths.sort(key=lambda path: [int(word) if word.isdigit() else 0 for word in re.split(r"[-.]", path)])
    if not paths:
        raise FileNotFoundError(2, "no step log (metrics*.jsonl) here", uri)
    lines = [line for path in paths for line in filesystem.cat_file(path).decode("utf-8", "replace").splitlines()]
    return StepLog.parse(thin.thin(lines, SHOWN))


def of_cluster(kube: Kube, job: Mapping[str, Any], pods: list[dict[str, Any]]) -> tuple[StepLog | None, str]:
    """The step log of a job, or why there is none and what to do about it."""
    uri = ((job.get("spec") or {}).get("checkpoint") or {}).get("uri")
    if not uri:
        return None, "The job has no checkpoint.uri, beside which a step log would be kept."
    if _URL.match(uri):
        try:
            return read_uri(uri), ""
        except (OSError, ValueError, ImportError) as error:
            return None, f"The step log at {uri} cannot be read from here: {error}."
    try:
        claim = claim_of(uri)
    except ValueError as error:
        return None, f"{error}."
    remedy = "give a copy of the checkpoint directory with --steps DIR"
    running = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Running"]
    if not running:
        return None, f"The step log lies at {uri} and no pod runs to read it from; {remedy}."
    place = uri if claim is None else f"{PVC_ROOT}/{uri.removeprefix('pvc://')}"
    command = ["python3", "-c", inspect.getsource(thin), place, str(SHOWN)]
    name = str(running[0]["metadata"]["name"])
    try:
        return StepLog.parse(kube.execute(name, command).splitlines()), ""
    except KubeProblem as error:
        return None, f"The step log at {uri} could not be read: {error.format_message()}; {remedy}."
