"""A training run on the cluster as the demo and the end-to-end tests see it: its data, its log, its wounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import curve
from demo.corpus import corpus
from demo.kube import ROOT, Kube, wait_until
from demo.report import DemoError
from demo.storage import Storage
from demo.target import Target

VOCABULARY = 1024
ENDED = ("Succeeded", "Failed", "Invalid")


SHARDS = ROOT / ".demo" / "shards"
MANIFEST = "manifest.json"


def prepare(storage: Storage, path: str) -> dict[str, Any]:
    """Shards of the corpus at `path` of the storage, by the user's own command; returns their manifest."""
    command = [
        str(Path(sys.executable).parent / "trireme"),
        "prepare",
        str(corpus()),
        "--output",
        str(SHARDS),
        "--include",
        "*.txt",
        "--document-separator",
        "blank-line",
        "--vocabulary",
        str(VOCABULARY),
        # What an earlier demo made of another corpus is in the way of nobody.
        "--overwrite",
        "--json",
    ]
    SHARDS.parent.mkdir(exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"trireme prepare: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    manifest = (SHARDS / MANIFEST).read_text()
    if storage.text(f"{path}/{MANIFEST}") != manifest:
        storage.put(SHARDS, path)
    return dict(json.loads(manifest))


@dataclass(frozen=True)
class Run:
    """One TrainingJob and the storage that its checkpoints lie in."""

    kube: Kube
    name: str
    storage: Storage

    @property
    def place(self) -> str:
        """Of its checkpoints and its step log in the storage."""
        return f"checkpoints/{self.name}"

    def job(self) -> dict[str, Any]:
        found = self.kube.get("trainingjob", self.name)
        if found is None:
            raise DemoError(f"TrainingJob {self.name} is gone")
        return found

    def status(self) -> dict[str, Any]:
        return dict(self.job().get("status") or {})

    def curve(self) -> curve.Curve:
        return curve.parse(self.storage.text(f"{self.place}/metrics.jsonl").splitlines())

    def why(self) -> str:
        """One line on what the job does, for errors."""
        status = self.status()
        return f"phase {status.get('phase')}, {status.get('explanation')}"

    def wait_for(self, what: str, look: Callable[[], Any], timeout: float) -> Any:
        """Like `wait_until`, but a job that has failed is not waited for."""

        def watch() -> Any:
            value = look()
            if not value and self.status().get("phase") in ("Failed", "Invalid"):
                raise DemoError(f"{self.name}: {self.why()}")
            return value

        return wait_until(f"{self.name}: {what}", watch, timeout, why=self.why)

    def pod_of_slot(self, index: int) -> str:
        for slot in self.status().get("slots", []):
            if slot["index"] == index:
                return f"{self.name}-{index}-{slot['incarnation']}"
        raise DemoError(f"{self.name} has no slot {index}")


# Runs inside the pod: the children of PID 1 (the agent) are the ranks and their warm spares. Who trains has connections
# to its peers, who waits has none.
KILL = """
import glob, os, time
def connected(pid):
    for path in glob.glob(f"/proc/{pid}/fd/*"):
        try:
            if os.readlink(path).startswith("socket:"):
                return True
        except OSError:
            pass
    return False
ranks = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        words = open(f"/proc/{pid}/cmdline").read()
    except OSError:
        continue
    child = fields[1] == "1" and fields[0] != "Z" and str(os.getpid()) != pid
    if child and WANTED in words and connected(pid):
        ranks.append(int(pid))
assert ranks, "no rank runs in this pod"
os.kill(min(ranks), 9)
print(time.time(), min(ranks))
"""


def kill_rank(run: Run, slot: int, words: str = "trireme_trainer") -> float:
    """SIGKILL to a rank process in the pod of a slot; returns the Unix time at which it was sent."""
    script = KILL.replace("WANTED", repr(words))
    out = run.kube.exec(run.pod_of_slot(slot), "python3", "-c", script, container="trainer")
    return float(out.split()[0])


@dataclass(frozen=True)
class Recovery:
    killed_at: float
    attempt: int
    killed_in_step: int
    """The last step that was logged before the kill."""
    resumed_from: int
    first_step: int
    seconds: float
    """From the kill to the end of the first step of the new attempt."""
    phases: dict[str, float]
    """Seconds by phase, as the job's status has them."""

    def as_json(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt,
            "killedInStep": self.killed_in_step,
            "resumedFromStep": self.resumed_from,
            "firstNewStep": self.first_step,
            "secondsFromKillToFirstNewStep": round(self.seconds, 3),
            "phases": self.phases,
        }


def recover(run: Run, slot: int, timeout: float = 180) -> Recovery:
    """Kills a rank and waits until the gang has done a step again."""
    before = run.curve()
    attempt = run.status()["attempt"]
    killed_at = kill_rank(run, slot)

    def first() -> curve.Row | None:
        rows = [row for row in run.curve().rows if row.attempt > attempt]
        return rows[0] if rows else None

    row = run.wait_for("first step after the kill", first, timeout)

    def phases() -> dict[str, float] | None:
        found = (run.status().get("lastFailure") or {}).get("phases") or {}
        return found if "firstStep" in found else None

    found = run.wait_for("recovery times in status", phases, 60)
    return Recovery(
        killed_at=killed_at,
        attempt=row.attempt,
        killed_in_step=before.last_step(),
        resumed_from=row.step - 1,
        first_step=row.step,
        seconds=row.time - killed_at,
        phases=found,
    )


def fresh(target: Target, manifest: Path, name: str, *options: str) -> Run:
    """Removes an earlier job of the name with its checkpoints, then applies the manifest."""
    storage = target.storage()
    target.kube.delete("trainingjob", name)
    wait_until(
        f"pods of an earlier {name}: end", lambda: not target.kube.items("pods", f"trireme.dev/job={name}"), timeout=120
    )
    run = Run(target.kube, name, storage)
    storage.remove(run.place)
    if storage.node_selector:
        # kubectl's own parser: what another makes of a number like 180e9 is a matter of taste.
        job = target.kube.json("create", "--dry-run=client", "--validate=false", "-f", str(manifest))
        job["spec"].setdefault("template", {})["nodeSelector"] = dict(storage.node_selector)
        target.kube.out("apply", *options, "-f", "-", text=json.dumps(job))
    else:
        target.kube.out("apply", *options, "-f", str(manifest))
    return run


def started(run: Run, timeout: float = 240) -> None:
    run.wait_for("first step", lambda: run.curve().rows, timeout)


def own_time() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def cpu_model() -> str:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {models[0] if models else 'unknown CPU'}"
