"""A job that trains, the operator and the agents as processes of this machine beside a real API server, and a real
Prometheus that scrapes them by what manifests/monitoring says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localcluster.api import Api
from localcluster.apiserver import ApiServer, free_ports
from localcluster.prometheus import Prometheus
from rig import KubeletStandIn, OperatorProcess, World, add_namespace, add_node, eventually
from scraping import Json, config, discover
from trireme_agent.processes import descendants
from trireme_api.crd import crd, strip_cel
from trireme_api.protocol import Env

NAMESPACE, JOB = "research", "opt-tiny"
ROOT = Path(__file__).resolve().parents[2]
NODES = ("node-a", "node-b")
SYSTEM = "trireme-system"
OPERATOR = "trireme-operator-0"


class Kubelet(KubeletStandIn):
    """Gives each pod metrics ports of its own, for all share this machine's addresses."""

    def __init__(self, world: World, folder: Path) -> None:
        super().__init__(world, folder, list(NODES), run=True)
        self.ports: dict[str, tuple[int, int]] = {}
        """Of agent and trainer by pod UID."""

    def environment(self, pod: Json) -> dict[str, str]:
        agent, trainer = free_ports(2)
        self.ports[pod["metadata"]["uid"]] = agent, trainer
        return {Env.AGENT_METRICS_PORT: str(agent), Env.METRICS_PORT: str(trainer)}


def spec(steps: int, every: int) -> Json:
    return {
        "recipe": {
            "model": {"preset": "opt-tiny", "overrides": {"dropout": 0.0, "attentionDropout": 0.0}},
            "data": {"sources": [{"path": "pvc://corpus/licence"}], "sequenceLength": 32},
            "batch": {"tokens": 384, "micro": 2},
            "optimizer": {"learningRate": 1.0e-3},
            "schedule": {"warmupTokens": 19200},
            "precision": "fp32",
            "until": {"steps": steps},
        },
        "replicas": {"desired": 2},
        "checkpoint": {"uri": f"pvc://checkpoints/{JOB}", "everySteps": every, "keep": 2},
        "template": {
            "resources": {"requests": {"cpu": "200m"}}, "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "terminationGracePeriodSeconds": 10,
        },
        "carbonPolicy": {"zone": "SE"},
    }  # fmt: skip


class Running:
    """What the tests look at."""

    def __init__(self, world: World, operator: OperatorProcess, kubelet: Kubelet, folder: Path) -> None:
        self.world, self.operator, self.kubelet, self.folder = world, operator, kubelet, folder
        self.began = time.time()
        self.prometheus: Prometheus
        self._stop = threading.Event()

    def ports(self, pod: Json) -> dict[str, str]:
        if pod["metadata"]["name"] == OPERATOR:
            return {"metrics": f"127.0.0.1:{self.operator.ports[1]}"}
        agent, trainer = self.kubelet.ports.get(pod["metadata"]["uid"], (0, 0))
        return {"agent-metrics": f"127.0.0.1:{agent}", "trainer-metrics": f"127.0.0.1:{trainer}"} if agent else {}

    def discover(self) -> None:
        replica = {"metadata": {"namespace": SYSTEM, "name": OPERATOR}, "spec": {}, "status": {"phase": "Running"}}
        with contextlib.suppress(OSError, ValueError):
            discover(self.folder / "prometheus", self.world.pods(), [replica], self.ports)

    def keep_discovering(self) -> None:
        while not self._stop.wait(0.5):
            self.discover()

    def stop(self) -> None:
        self._stop.set()

    def kill_rank(self, pod: str) -> None:
        """SIGKILL to the pod's rank as soon as the job runs: who trains has connections, a warm spare has none."""
        eventually(lambda: self.world.phase(JOB) == "Running", "it runs", 120)
        uid = next(uid for uid, name in self.kubelet.names.items() if name == pod)
        below = descendants(self.kubelet.processes[uid].pid)
        os.kill(min(filter(_connected, below)), signal.SIGKILL)

    def failed(self) -> bool:
        status = self.world.status(JOB)
        assert status.get("phase") not in ("Failed", "Invalid"), status.get("explanation")
        return False

    def step(self) -> int:
        return int((self.world.status(JOB).get("progress") or {}).get("step", 0))


def _connected(pid: int) -> bool:
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor).startswith("socket:"):
                return True
    return False


def shards(folder: Path) -> None:
    """The project's own licence, tokenised by the user's command."""
    folder.parent.mkdir(parents=True)
    command = [
        str(Path(sys.executable).parent / "trireme"), "prepare", str(ROOT / "LICENSE"), "--output", str(folder),
        "--document-separator", "blank-line", "--vocabulary", "384",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def running(folder: Path, *, interval: str = "1s", steps: int = 100_000, every: int = 50) -> Iterator[Running]:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ApiServer(folder / "control-plane"))
        world = _world(server)
        operator = OperatorProcess(world, folder)
        stack.callback(operator.kill)
        operator.start()
        kubelet = Kubelet(world, folder)
        stack.enter_context(kubelet)
        found = Running(world, operator, kubelet, folder)
        stack.callback(found.stop)
        found.discover()
        made = config(folder / "prometheus", interval=interval, rules_interval="2s")
        found.prometheus = stack.enter_context(Prometheus(folder / "prometheus", made))
        threading.Thread(target=found.keep_discovering, daemon=True).start()
        (folder / "pvc" / "checkpoints").mkdir(parents=True)
        shards(folder / "pvc" / "corpus" / "licence")
        world.create(JOB, spec(steps, every))
        eventually(lambda: found.step() > 0 or found.failed(), "the first step", 180, pause=0.5)
        yield found


def _world(server: ApiServer) -> World:
    api = Api(server.kubeconfig)
    version = api.request("GET", "/version")
    cel = (int(version["major"]), int(version["minor"].rstrip("+"))) >= (1, 25)
    definition: Any = crd() if cel else strip_cel(crd())
    api.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
    for namespace in (SYSTEM, NAMESPACE):
        add_namespace(api, namespace)
    for node in NODES:
        add_node(api, node, {"cpu": "64", "memory": "256Gi", "pods": "500"})
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", account)
    for claim in ("corpus", "checkpoints"):
        body = {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }  # fmt: skip
        api.request("POST", f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims", body)
    world = World(api, server.kubeconfig, NAMESPACE)
    eventually(world.served, "the TrainingJob resource is served")
    return world
