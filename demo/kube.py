"""kubectl, as the demo and the end-to-end tests use it: the very tool a user has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from demo.report import DemoError

ROOT = Path(__file__).resolve().parents[1]


def kubectl_path() -> str:
    """The pinned kubectl of the environment, else the one on PATH."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if not found:
        raise DemoError("kubectl is not installed; run `make venv`")
    return found


@dataclass(frozen=True)
class Kube:
    kubeconfig: Path
    namespace: str = "default"

    def call(
        self,
        *arguments: str,
        text: str | None = None,
        source: IO[bytes] | None = None,
        check: bool = True,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl; raises DemoError with the last line of its errors unless `check` is off.

        It reads `text`, or an open file from where its descriptor stands.
        """
        given: dict[str, Any] = {"stdin": source} if source is not None else {"input": text or ""}
        command = [kubectl_path(), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *arguments]
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        try:
            done = subprocess.run(
                command, **given, capture_output=True, text=True, timeout=timeout, check=False, env=env
            )
        except subprocess.TimeoutExpired:
            raise DemoError(f"kubectl {' '.join(arguments[:3])} gave no answer within {timeout:.0f} s") from None
        if check and done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise DemoError(f"kubectl {' '.join(arguments[:4])}: {lines[-1]}")
        return done

    def out(self, *arguments: str, text: str | None = None, timeout: float = 120) -> str:
        return self.call(*arguments, text=text, timeout=timeout).stdout

    def json(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self.out(*arguments, "-o", "json")))

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """The object, or None if it is not there."""
        done = self.call("get", kind, name, "-o", "json", "--ignore-not-found")
        return dict(json.loads(done.stdout)) if done.stdout.strip() else None

    def items(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        chosen = ["-l", selector] if selector else []
        return list(self.json("get", kind, *chosen)["items"])

    def apply(self, *documents: dict[str, Any]) -> str:
        return self.out("apply", "-f", "-", text="\n---\n".join(json.dumps(d) for d in documents))

    def delete(self, kind: str, name: str, wait: bool = True) -> None:
        self.call("delete", kind, name, "--ignore-not-found", f"--wait={str(wait).lower()}", timeout=180)

    def exec(
        self, pod: str, *command: str, container: str = "", source: IO[bytes] | None = None, timeout: float = 60
    ) -> str:
        chosen = [*(["-c", container] if container else []), *(["-i"] if source is not None else [])]
        return self.call("exec", pod, *chosen, "--", *command, source=source, timeout=timeout).stdout

    def within(self, namespace: str) -> Kube:
        return Kube(self.kubeconfig, namespace)


def wait_until(
    what: str, look: Callable[[], Any], timeout: float, every: float = 0.5, why: Callable[[], str] | None = None
) -> Any:
    """The first truthy value of `look`; raises DemoError naming what was awaited (and `why` it is not there)."""
    deadline = time.monotonic() + timeout
    while True:
        value = look()
        if value:
            return value
        if time.monotonic() > deadline:
            detail = f": {why()}" if why else ""
            raise DemoError(f"{what} did not happen within {timeout:.0f} s{detail}")
        time.sleep(every)


def conditions(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["type"]: c for c in job.get("status", {}).get("conditions", [])}


def events_of(kube: Kube, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Events of this very TrainingJob, not of an earlier one of its name; oldest first."""
    chosen = f"involvedObject.uid={job['metadata']['uid']}"
    found = kube.json("get", "events", "--field-selector", chosen)["items"]

    def when(event: dict[str, Any]) -> str:
        return str(event.get("eventTime") or event.get("firstTimestamp") or event["metadata"]["creationTimestamp"])

    return sorted(found, key=when)
