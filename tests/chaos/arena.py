"""Where a chaos run happens: what a fault may do to a cluster, whichever it is, and one job in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from chaos.measure import Broken, duplicates
from demo import curve as curves

Json = dict[str, Any]


class Arena(Protocol):
    """A control plane and nodes on this machine; `ClusterArena` and `LocalArena` are the two."""

    name: str

    def submit(self, name: str, spec: Json) -> None: ...
    def remove(self, name: str) -> None: ...
    def job(self, name: str) -> Json: ...
    def patch(self, name: str, spec: Json) -> None: ...
    def pods(self, name: str) -> list[Json]: ...
    def checkpoints(self, name: str) -> Path: ...
    def delete_pod(self, pod: str, grace: int | None) -> None:
        """`grace` 0: gone at once; None: the pod's own grace period, as a drain does."""

    def kill_operator(self) -> None:
        """SIGKILL; whatever keeps it running starts it again."""

    def operator_leads(self) -> bool: ...
    def api_server(self, up: bool) -> None: ...
    def storage_size(self, name: str) -> int:
        """Bytes that the file system of the checkpoints may hold; it is the job's alone."""


def wait_until(what: str, look: Callable[[], Any], timeout: float, every: float = 0.05) -> Any:
    """The first truthy answer. Raises Broken naming what was awaited."""
    deadline = time.monotonic() + timeout
    while True:
        value = look()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Broken(f"not within {timeout:.0f} s: {what}")
        time.sleep(every)


class Job:
    """One TrainingJob under test."""

    def __init__(self, arena: Arena, name: str, every: int) -> None:
        self.arena, self.name, self.every = arena, name, every

    def status(self) -> Json:
        return dict(self.arena.job(self.name).get("status") or {})

    @property
    def folder(self) -> Path:
        return self.arena.checkpoints(self.name)

    def lines(self) -> list[str]:
        path = self.folder / "metrics.jsonl"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def curve(self) -> curves.Curve:
        return curves.parse(self.lines())

    def attempt(self) -> int:
        return int(self.status().get("attempt") or 0)

    def pod(self, slot: int) -> Json:
        """The pod that fills a slot now."""
        for pod in self.arena.pods(self.name):
            metadata = pod["metadata"]
            if metadata["labels"].get("trireme.dev/slot") == str(slot) and not metadata.get("deletionTimestamp"):
                return pod
        raise Broken(f"slot {slot} of {self.name} has no pod")

    def why(self) -> str:
        status = self.status()
        return f"phase {status.get('phase')}, attempt {status.get('attempt')}: {status.get('explanation')}"

    def wait_for(self, what: str, look: Callable[[], Any], timeout: float = 120.0) -> Any:
        """Like `wait_until`, but a job that has ended is not waited for."""
        checked = [time.monotonic()]

        def watch() -> Any:
            value = look()
            if not value and time.monotonic() - checked[0] > 1.0:
                checked[0] = time.monotonic()
                with contextlib.suppress(OSError):
                    if self.status().get("phase") in ("Failed", "Invalid", "Succeeded"):
                        raise Broken(f"{what}: the job has ended: {self.why()}")
            return value

        try:
            return wait_until(what, watch, timeout)
        except Broken as error:
            with contextlib.suppress(OSError):
                raise Broken(f"{error}; {self.why()}") from None
            raise

    @staticmethod
    def heartbeat(pid: int) -> Json:
        """What that rank last wrote: `step`, and `time`, Unix seconds by its own clock."""
        folder, local = environment(pid)["TRIREME_HEARTBEAT_DIR"], environment(pid).get("LOCAL_RANK", "0")
        return dict(json.loads(Path(f"{folder}/rank-{local}.json").read_text()))

    def committed(self) -> int:
        """Step of the newest committed checkpoint on disk."""
        return max(self.checkpoints(), default=0)

    def checkpoints(self) -> list[int]:
        """Steps of all committed checkpoints on disk."""
        return [int(path.name.removeprefix("step-")) for path in self.folder.glob("step-????????")]

    def steady(self, beyond: int = 5) -> None:
        """Waits until all ranks run, this attempt has done steps, and some steps lie beyond a checkpoint it could
        resume from: so that a fault now costs something, and what it costs is known."""

        def there() -> bool:
            curve = self.curve()
            if not curve.rows:
                return False
            newest = curve.of(curve.attempts()[-1])
            last, saved = newest[-1].step, self.committed()
            return len(newest) > beyond and saved > 0 and saved + beyond <= last < saved + self.every - 2

        self.wait_for("all ranks run", lambda: self.status().get("phase") == "Running", 240)
        self.wait_for("steps beyond a checkpoint", there, 240)

    def spares_ready(self) -> None:
        """Waits until every pod's warm spares have imported the trainer and sleep."""
        agents = [agent_of(pod) for pod in self.arena.pods(self.name) if not pod["metadata"].get("deletionTimestamp")]
        for agent in agents:
            if environment(agent).get("TRIREME_AGENT_WARM_START") != "1":
                return
        self.wait_for("spares that have imported the trainer", lambda: all(sleeping_spares(a) for a in agents), 240)

    def further(self, steps: int, timeout: float = 120.0) -> None:
        here = self.curve().last_step()
        self.wait_for(f"step {here + steps}", lambda: self.curve().last_step() >= here + steps, timeout)


class Watch:
    """Looks at the pods all the time: a slot must never be filled twice."""

    def __init__(self, job: Job, every: float = 0.2) -> None:
        self._job, self._every = job, every
        self.seen: list[str] = []
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _loop(self) -> None:
        while not self._stop.wait(self._every):
            try:
                pods = self._job.arena.pods(self._job.name)
            except Exception:  # the API server may be the one that is away; the count tells whether we looked
                continue
            self.looks += 1
            self.seen += duplicates(pods)

    def check(self) -> None:
        if self.seen:
            raise Broken(f"more than one pod filled a slot: {sorted(set(self.seen))[:3]}")
        if not self.looks:
            raise Broken("the pods could never be looked at")


def environment(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty when it is gone or not ours to read."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (part.split(b"=", 1) for part in data.split(b"\0") if b"=" in part)
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in pairs}


def of_pod(uid: str) -> dict[int, dict[str, str]]:
    """Processes of a pod by their id on this machine, with their environments: containers run on its own kernel."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            variables = environment(int(entry))
            if variables.get("TRIREME_POD_UID") == uid and alive(int(entry)):
                found[int(entry)] = variables
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def agent_of(pod: Json) -> int:
    """Process id of a pod's agent: the one that no other process of the pod has started."""
    found = of_pod(pod["metadata"]["uid"])
    agents = [pid for pid in found if parent(pid) not in found and "RANK" not in found[pid]]
    if len(agents) != 1:
        raise Broken(f"pod {pod['metadata']['name']} has {len(agents)} agents here; are its nodes on this machine?")
    return agents[0]


def rank_of(pod: Json) -> int:
    """Process id of a pod's first rank. A warm standby is a child of the agent, too, and was started with no RANK, as
    was a rank that had been one; but who trains has connections to its peers, and who waits has none."""
    agent = agent_of(pod)
    ranks = [pid for pid in of_pod(pod["metadata"]["uid"]) if parent(pid) == agent and connected(pid)]
    if not ranks:
        raise Broken(f"no rank runs in pod {pod['metadata']['name']}")
    return min(ranks)


def sleeping_spares(agent: int) -> bool:
    """Whether an agent has spares, and each sleeps and has used no processor time for a second."""

    def look() -> dict[int, tuple[str, str]]:
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and parent(int(entry)) == agent and not connected(int(entry)):
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                    found[int(entry)] = (fields[0], f"{fields[11]} {fields[12]}")
        return found

    before = look()
    time.sleep(1.0)
    return bool(before) and before == look() and all(state == "S" for state, _ in before.values())


def connected(pid: int) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}").startswith("socket:"):
                    return True
    except OSError:
        pass
    return False


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> float:
    """Sends the signal; returns the Unix time at which it was sent."""
    at = time.time()
    os.kill(pid, number)
    return at
