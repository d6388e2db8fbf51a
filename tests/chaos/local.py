"""Local processes: a real etcd, API server and operator, real agents and ranks; only scheduler and kubelet are stood in
for. Everything lies in one folder and ends with the run."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localcluster.api import Api
from localcluster.apiserver import ApiServer
from rig import KubeletStandIn, OperatorProcess, World, add_namespace, add_node
from trireme_api.crd import crd, strip_cel

from chaos.arena import Json, wait_until

NODES = ("node-a", "node-b", "node-c")
ROOM = {"cpu": "64", "memory": "256Gi", "pods": "500"}
DISK_BYTES = 256 * 1024 * 1024
SLOTS = 64


class OperatorKeeper:
    """Starts the operator again when it has ended, as its Deployment would; without the back-off of a crash loop."""

    def __init__(self, operator: OperatorProcess) -> None:
        self.operator = operator
        self.starts = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="operator keeper", daemon=True)

    def __enter__(self) -> OperatorKeeper:
        self._thread.start()
        wait_until("the operator is ready", lambda: self.operator.get("/readyz") == "ok", 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.operator.kill()

    def _loop(self) -> None:
        while not self._stop.wait(0.2):
            process = self.operator.process
            if process is None or process.poll() is not None:
                self.operator.start(ready=False)
                self.starts += 1


class LocalArena:
    name = "local"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> LocalArena:
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(ApiServer(self.folder / "control-plane"))
            api = Api(self.server.kubeconfig)
            version = api.request("GET", "/version")
            cel = (int(version["major"]), int(version["minor"].rstrip("+"))) >= (1, 25)
            path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
            api.request("POST", path, crd() if cel else strip_cel(crd()))
            for namespace in ("trireme-system", "chaos"):
                add_namespace(api, namespace)
            for node in NODES:
                add_node(api, node, ROOM)
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
            api.request("POST", "/api/v1/namespaces/chaos/serviceaccounts", account)
            self.world = World(api, self.server.kubeconfig, "chaos")
            wait_until("the TrainingJob resource is served", self.world.served, 30)
            self.clocks = stack.enter_context(clocks(self.folder))
            self.disk = stack.enter_context(disk(self.folder / "pvc" / "checkpoints"))
            stack.enter_context(KubeletStandIn(self.world, self.folder, list(NODES), run=True))
            operator = OperatorProcess(self.world, self.folder)
            self.keeper = stack.enter_context(OperatorKeeper(operator))
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def claim(self, name: str) -> Path:
        path = self.folder / "pvc" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def submit(self, name: str, spec: Json) -> None:
        self.world.create(name, spec)
        self._claim_object("checkpoints")
        self._claim_object("corpus")

    def _claim_object(self, name: str) -> None:
        """The operator looks whether a claim is there before it makes pods."""
        path = "/api/v1/namespaces/chaos/persistentvolumeclaims"
        body = {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }  # fmt: skip
        with contextlib.suppress(urllib.error.HTTPError):
            self.world.api.request("POST", path, body)

    def remove(self, name: str) -> None:
        self.world.delete(name)
        # Nobody collects garbage here: no controller manager runs.
        for pod in self.world.pods(name):
            self.delete_pod(pod["metadata"]["name"], 0)
        wait_until(f"pods of {name} end", lambda: not self.world.pods(name), 30)
        shutil.rmtree(self.checkpoints(name), ignore_errors=True)

    def job(self, name: str) -> Json:
        return self.world.job(name) or {}

    def patch(self, name: str, spec: Json) -> None:
        self.world.patch(name, spec)

    def pods(self, name: str) -> list[Json]:
        return self.world.pods(name)

    def checkpoints(self, name: str) -> Path:
        return self.disk / name

    def delete_pod(self, pod: str, grace: int | None) -> None:
        body: Any = {} if grace is None else {"gracePeriodSeconds": grace}
        self.world.found("DELETE", f"/api/v1/namespaces/chaos/pods/{pod}", body)

    def kill_operator(self) -> None:
        self.keeper.operator.kill()

    def operator_leads(self) -> bool:
        return self.keeper.operator.metric("trireme_leader") == 1

    def api_server(self, up: bool) -> None:
        if up:
            self.server.start_process("kube-apiserver")
            self.server.wait_ready()
        else:
            self.server.kill_process("kube-apiserver")

    def storage_size(self, name: str) -> int:
        return DISK_BYTES

    def clock_ahead(self, slot: int, seconds: int) -> None:
        """The wall clock of all processes in a slot's pods is so far ahead of the machine's from now on."""
        with self.clocks.open("r+b") as file:
            file.seek(8 * slot)
            file.write(struct.pack("q", seconds))


@contextlib.contextmanager
def disk(path: Path) -> Iterator[Path]:
    """A small file system of its own, so that it can be filled without harm to anything else. Needs root."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "trireme-chaos", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


@contextlib.contextmanager
def clocks(folder: Path) -> Iterator[Path]:
    """The file that `clock.c` reads; every process started from now on has that library preloaded. Needs gcc."""
    path, library = folder / "clocks", folder / "clock.so"
    path.write_bytes(bytes(8 * SLOTS))
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    before = {name: os.environ.get(name) for name in ("LD_PRELOAD", "CHAOS_CLOCKS")}
    os.environ |= {"LD_PRELOAD": str(library), "CHAOS_CLOCKS": str(path)}
    try:
        yield path
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
