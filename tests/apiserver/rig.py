"""What the API-server tests share: the operator as a process, and stand-ins for what a bare control plane lacks.

The API server and etcd are real. There is no scheduler and no kubelet: `KubeletStandIn` binds pods to nodes, writes the
phases a kubelet would write, and where asked runs each pod's command as a process of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localcluster.api import Api
from localcluster.apiserver import free_ports
from trireme_agent.processes import descendants
from trireme_api.job import API_VERSION, GROUP, KIND, PLURAL, VERSION

ROOT = Path(__file__).resolve().parents[2]
MERGE = "application/merge-patch+json"
Json = dict[str, Any]


def eventually(check: Callable[[], Any], what: str, seconds: float = 30.0, pause: float = 0.1) -> Any:
    """The first truthy answer of `check`; fails with its last one."""
    until, last = time.monotonic() + seconds, None
    while time.monotonic() < until:
        last = check()
        if last:
            return last
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s: {what}; last: {last!r}")


@dataclass
class World:
    """One namespace of the API server, in words of this project."""

    api: Api
    kubeconfig: Path
    namespace: str
    last: Json = field(default_factory=dict)

    def path(self, name: str = "", sub: str = "") -> str:
        base = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{PLURAL}"
        return base + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")

    def create(self, name: str, spec: Json, annotations: Json | None = None) -> Json:
        metadata: Json = {"name": name, "namespace": self.namespace}
        if annotations:
            metadata["annotations"] = annotations
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}
        return self.api.request("POST", self.path(), body)

    def job(self, name: str) -> Json | None:
        return self.found("GET", self.path(name))

    def found(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """The answer, or None for 404."""
        try:
            return self.api.request(method, path, body, **more)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def jobs(self) -> list[Json]:
        return self.api.request("GET", self.path(), timeout=30.0)["items"]

    def served(self) -> bool:
        """Whether the API server knows TrainingJobs: it answers 404 for a moment after the definition was made."""
        return self.found("GET", self.path()) is not None

    def status(self, name: str) -> Json:
        return (self.job(name) or {}).get("status") or {}

    def phase(self, name: str) -> str:
        return self.status(name).get("phase", "")

    def condition(self, name: str, kind: str) -> Json:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def patch(self, name: str, spec: Json) -> Json:
        return self.api.request("PATCH", self.path(name), {"spec": spec}, content=MERGE)

    def delete(self, name: str) -> None:
        self.found("DELETE", self.path(name), {"propagationPolicy": "Background"})

    def pods(self, job: str | None = None) -> list[Json]:
        selector = f"?labelSelector=trireme.dev/job={job}" if job else "?labelSelector=trireme.dev/managed=true"
        path = f"/api/v1/namespaces/{self.namespace}/pods{selector}"
        return self.api.request("GET", path, timeout=30.0)["items"]

    def events(self, job: str) -> list[Json]:
        items = self.api.request("GET", f"/api/v1/namespaces/{self.namespace}/events")["items"]
        return [item for item in items if item["involvedObject"]["name"] == job]

    def wait_phase(self, name: str, *phases: str, seconds: float = 30.0) -> Json:
        def there() -> Json | None:
            status = self.status(name)
            if status.get("phase") not in phases:
                self.last = {key: status.get(key) for key in ("phase", "explanation", "attempt", "slots")}
                return None
            return status

        try:
            return eventually(there, f"{name} in {phases}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {self.last}") from None


def add_namespace(api: Api, name: str) -> None:
    api.request("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def add_node(api: Api, name: str, allocatable: Json) -> None:
    """A node that is ready and takes pods, without a machine behind it."""
    with contextlib.suppress(urllib.error.HTTPError):
        api.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    status = {"allocatable": allocatable, "capacity": allocatable, "conditions": [ready]}
    api.request("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, content=MERGE)
    api.request("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, content=MERGE)


def set_ready(api: Api, name: str, ready: bool) -> None:
    condition = {"type": "Ready", "status": "True" if ready else "Unknown", "reason": "StandIn"}
    api.request("PATCH", f"/api/v1/nodes/{name}/status", {"status": {"conditions": [condition]}}, content=MERGE)


@dataclass
class OperatorProcess:
    """`python -m trireme_operator` as a child, killed with what it started."""

    world: World
    folder: Path
    identity: str = "operator"
    flags: tuple[str, ...] = ()
    lease: str = ""
    process: subprocess.Popen[bytes] | None = None
    ports: list[int] = field(default_factory=lambda: free_ports(2))

    @property
    def coordinator(self) -> str:
        return f"https://127.0.0.1:{self.ports[0]}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.identity}.log"

    def start(self, ready: bool = True) -> OperatorProcess:
        command = [
            sys.executable, "-m", "trireme_operator", "--kubeconfig", str(self.world.kubeconfig),
            "--namespaces", self.world.namespace, "--identity", self.identity,
            "--lease-name", self.lease or f"lease-{self.world.namespace}",
            "--coordinator-host", "127.0.0.1", "--coordinator-port", str(self.ports[0]),
            "--coordinator-url", self.coordinator, "--metrics-port", str(self.ports[1]),
            "--progress-seconds", "1", "--resync-seconds", "5", *self.flags,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=python_env())
        if ready:
            eventually(lambda: self.get("/readyz") == "ok" or self._gone(), f"operator ready, see {self.log}", 60.0)
        return self

    def _gone(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the operator ended: {self.log.read_text()[-2000:]}")
        return False

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[1]}{path}", timeout=5.0) as answer:
                return answer.read().decode()
        except (OSError, ValueError):
            return ""

    def metric(self, name: str) -> float:
        """The value of the series that begins with `name`, or 0."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(name) and line[len(name) : len(name) + 1] in ("", " ", "{"):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def quantile(self, histogram: str, q: float) -> float:
        """An upper bound of the quantile: the smallest bucket that holds it."""
        buckets = []
        for line in self.get("/metrics").splitlines():
            if line.startswith(f'{histogram}_bucket{{le="'):
                bound, count = line.split('le="', 1)[1].split('"} ')
                buckets.append((float(bound), float(count)))
        total = buckets[-1][1]
        return next(bound for bound, count in buckets if count >= q * total)

    def kill(self) -> None:
        """SIGKILL: no clean-up of any kind."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def python_env() -> dict[str, str]:
    places = [str(ROOT / part) for part in ("api", "operator", "trainer", "cli")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}


class KubeletStandIn:
    """Scheduler and kubelet of one namespace. `run`: each container is a process; else pods just stay Running."""

    def __init__(self, world: World, folder: Path, nodes: list[str], *, run: bool = False, pause: float = 0.15) -> None:
        self.world, self.folder, self.nodes, self.run, self.pause = world, folder, nodes, run, pause
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By pod UID."""
        self.names: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="kubelet stand-in", daemon=True)
        self.errors: list[str] = []
        self._turn = 0

    def __enter__(self) -> KubeletStandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self._end_all_but(set())

    def _end_all_but(self, known: set[str]) -> None:
        """A pod that the API server no longer knows must not run: all of it is killed, as with its namespace."""
        for uid, process in self.processes.items():
            if uid not in known and process.poll() is None:
                ranks = descendants(process.pid)
                process.kill()
                for pid in ranks:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                process.wait(5)

    def _loop(self) -> None:
        while not self._stop.wait(self.pause):
            try:
                pods = self.world.pods()
                for pod in pods:
                    self._look(pod)
                self._end_all_but({pod["metadata"]["uid"] for pod in pods})
            except (OSError, ValueError) as error:
                self.errors.append(str(error))

    def _look(self, pod: Json) -> None:
        metadata, status = pod["metadata"], pod.get("status") or {}
        uid, phase = metadata["uid"], status.get("phase", "Pending")
        process = self.processes.get(uid)
        if metadata.get("deletionTimestamp"):
            self._leave(pod, process)
        elif not pod["spec"].get("nodeName"):
            self._bind(pod)
        elif phase == "Pending":
            self._begin(pod)
        elif phase == "Running" and process is not None and process.poll() is not None:
            self._ended(pod, process.returncode)

    def path(self, pod: Json, sub: str = "") -> str:
        base = f"/api/v1/namespaces/{self.world.namespace}/pods/{pod['metadata']['name']}"
        return base + (f"/{sub}" if sub else "")

    def _bind(self, pod: Json) -> None:
        if not self.nodes:
            return  # no room anywhere
        self._turn += 1
        node = self.nodes[self._turn % len(self.nodes)]
        body = {
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }  # fmt: skip
        self.world.found("POST", self.path(pod, "binding"), body)

    def _begin(self, pod: Json) -> None:
        if self.run:
            self._launch(pod)
        state = {"running": {"startedAt": now()}}
        self._status(pod, {"phase": "Running", "podIP": "127.0.0.1", "containerStatuses": [container(state)]})

    def _ended(self, pod: Json, code: int) -> None:
        log = self.folder / f"{pod['metadata']['uid']}.termination"
        terminated = {
            "exitCode": code if code >= 0 else 128 - code, "reason": "Completed" if code == 0 else "Error",
            "finishedAt": now(), "startedAt": now(), "message": log.read_text() if log.exists() else "",
        }  # fmt: skip
        phase = "Succeeded" if code == 0 else "Failed"
        self._status(pod, {"phase": phase, "containerStatuses": [container({"terminated": terminated})]})

    def _leave(self, pod: Json, process: subprocess.Popen[bytes] | None) -> None:
        if process is not None and process.poll() is None:
            if not getattr(process, "asked", False):
                process.terminate()
                process.asked = True  # type: ignore[attr-defined]
            return
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        self.world.found("DELETE", self.path(pod), body)

    def _status(self, pod: Json, status: Json) -> None:
        self.world.found("PATCH", self.path(pod, "status"), {"status": status}, content=MERGE)

    def _launch(self, pod: Json) -> None:
        metadata, main = pod["metadata"], pod["spec"]["containers"][0]
        uid = metadata["uid"]
        place = self.folder / uid
        place.mkdir(parents=True, exist_ok=True)
        fields = {"metadata.name": metadata["name"], "metadata.uid": uid, "spec.nodeName": pod["spec"]["nodeName"]}
        env = python_env()
        for item in main["env"]:
            reference = item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            env[item["name"]] = fields[reference] if reference else item.get("value", "").replace("$$", "$")
        (place / "token").write_text(self.token(pod))
        env |= {
            "TRIREME_TOKEN_FILE": str(place / "token"), "TRIREME_HEARTBEAT_DIR": str(place / "run"),
            "TRIREME_LOG_DIR": str(place / "logs"), "TRIREME_STOP_FILE": str(place / "run" / "stop"),
            "TRIREME_TERMINATION_LOG": str(self.folder / f"{uid}.termination"), "TRIREME_AGENT_METRICS_PORT": "off",
            "TRIREME_PVC_ROOT": str(self.folder / "pvc"), "HOME": str(place),
            **self.environment(pod),
        }  # fmt: skip
        (place / "run").mkdir(exist_ok=True)
        assert main["command"][:3] == ["python3", "/trireme/agent.pyz", "--"]
        command = [sys.executable, "-m", "trireme_agent", "--", *main["command"][3:]]
        with (place / "output").open("ab") as output:
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, start_new_session=True, cwd=place
            )
        self.processes[uid], self.names[uid] = process, metadata["name"]

    def environment(self, pod: Json) -> dict[str, str]:
        """More variables for a pod's container, for stand-ins that know more."""
        return {}

    def token(self, pod: Json, audience: str = "trireme") -> str:
        return pod_token(self.world, pod, audience)

    def output(self, name: str) -> str:
        return "".join((self.folder / uid / "output").read_text() for uid, known in self.names.items() if known == name)


def pod_token(world: World, pod: Json, audience: str = "trireme") -> str:
    """A token as the kubelet would project it: bound to the pod, for one audience."""
    body = {
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {
            "audiences": [audience], "expirationSeconds": 3600,
            "boundObjectRef": {
                "kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"],
            },
        },
    }  # fmt: skip
    path = f"/api/v1/namespaces/{world.namespace}/serviceaccounts/default/token"
    return world.api.request("POST", path, body)["status"]["token"]


def container(state: Json) -> Json:
    return {
        "name": "trainer", "image": "stand-in", "imageID": "", "restartCount": 0, "ready": "running" in state,
        "state": state,
    }  # fmt: skip


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def script_job(nodes: int = 1, code: str = "import time; time.sleep(3600)", **spec: Any) -> Json:
    """A job of one's own script, no recipe."""
    return {
        "replicas": {"desired": nodes},
        "template": {
            "image": "stand-in", "command": [sys.executable, "-c", code], "resources": {"requests": {"cpu": "10m"}},
            "terminationGracePeriodSeconds": 5,
        },
        **spec,
    }  # fmt: skip


def last_applied(spec: Json, name: str, namespace: str) -> Json:
    manifest = {
        "apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name, "namespace": namespace, "annotations": {}},
        "spec": spec,
    }  # fmt: skip
    return {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(manifest)}


def lines(path: Path) -> Iterator[str]:
    return iter(path.read_text().splitlines()) if path.exists() else iter(())
