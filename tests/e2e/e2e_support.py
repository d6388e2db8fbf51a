"""What the end-to-end tests share: applying and removing jobs, and looking at the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from demo.target import OPERATOR, SYSTEM, Target
from demo.training import Run, fresh

STEPS = 40
EVERY = 10
"""Steps between checkpoints."""
Document = dict[str, Any]


class Jobs:
    """Applies jobs and removes them at the end of the test."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._folder = target, folder
        self.kube = target.kube
        self.names: list[str] = []

    def run(self, job: Document, name: str, *options: str) -> Run:
        job = {**job, "metadata": {"name": name}}
        if "checkpoint" in job["spec"]:
            job["spec"]["checkpoint"]["uri"] = f"pvc://checkpoints/{name}"
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job))
        self.names.append(name)
        return fresh(self._target, path, name, *options)

    def remove(self) -> None:
        for name in self.names:
            self._target.kube.delete("trainingjob", name)


def operator_pods(target: Target) -> list[Document]:
    return target.kube.within(SYSTEM).items("pods", f"app.kubernetes.io/name={OPERATOR}")


def operator_restarts(target: Target) -> tuple[str, int]:
    """(UID, restarts) of the operator's one pod."""
    (pod,) = [p for p in operator_pods(target) if "deletionTimestamp" not in p["metadata"]]
    return pod["metadata"]["uid"], sum(s["restartCount"] for s in pod["status"]["containerStatuses"])
