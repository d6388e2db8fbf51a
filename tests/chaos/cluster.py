"""The local cluster: real containers, kubelets and network; its nodes are namespaces of this machine, so that a fault
can reach into them."""

from __future__ import annotations

import shutil
import time
import urllib.error
from pathlib import Path
from typing import Any

from localcluster.api import Api
from localcluster.lifecycle import Cluster
from localcluster.paths import DEFAULT_NAME
from rig import World

from chaos.arena import Json, wait_until
from chaos.measure import Broken, seconds
from demo import target as demo
from demo.images import cluster_tool
from demo.target import OPERATOR, SYSTEM, Target

NAMESPACE = "chaos"
LEASE_FRESH_SECONDS = 6.0
"""Of a lease that is renewed every 2.5 s."""


class ClusterArena:
    name = "cluster"

    def __init__(self, target: Target) -> None:
        self.api = Api(target.kube.kubeconfig)
        self.world = World(self.api, target.kube.kubeconfig, NAMESPACE)
        self.cluster = Cluster(DEFAULT_NAME)
        self.disk = self.claim("checkpoints")

    @classmethod
    def up(cls) -> ClusterArena:
        target = demo.up()
        if target.kind != "builtin":
            raise Broken(
                f"this cluster is {target.kind}; the suite reaches into nodes of the built-in one: unset KUBECONFIG"
            )
        demo.install(target, *demo.images(target))
        return cls(target)

    def claim(self, name: str) -> Path:
        """A claim of the namespace that every node can mount; returns the folder of this machine that it is."""
        return Path(cluster_tool("cluster.py", "volume", name, "--namespace", NAMESPACE, data=True)["path"])

    def submit(self, name: str, spec: Json) -> None:
        self.remove(name)
        self.world.create(name, {**spec, "template": {**spec["template"], "imagePullPolicy": "Never"}})

    def remove(self, name: str) -> None:
        self.world.delete(name)
        wait_until(f"pods of {name} end", lambda: not self.world.pods(name), 180, every=0.5)
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
        self.world.found("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}", body)

    def operator_pod(self) -> Json | None:
        """The operator's pod that runs; None where none does or the API server is away."""
        path = f"/api/v1/namespaces/{SYSTEM}/pods?labelSelector=app.kubernetes.io/name={OPERATOR}"
        try:
            pods = self.api.request("GET", path)["items"]
        except (OSError, ValueError):
            return None
        staying = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return next((dict(pod) for pod in staying if pod["status"].get("phase") == "Running"), None)

    def kill_operator(self) -> None:
        """Its pod is deleted with no grace: SIGKILL, and the Deployment makes another at once. A kill of the process
        alone would measure the kubelet's back-off, which doubles with every trial."""
        pod = wait_until("the operator runs", self.operator_pod, 120)
        body = {"gracePeriodSeconds": 0}
        self.api.request("DELETE", f"/api/v1/namespaces/{SYSTEM}/pods/{pod['metadata']['name']}", body)

    def operator_leads(self) -> bool:
        """The lease is fresh and held by a pod that runs."""
        pod = self.operator_pod()
        if pod is None:
            return False
        try:
            path = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/{OPERATOR}"
            lease = self.api.request("GET", path)["spec"]
        except (urllib.error.URLError, ValueError):
            return False
        renewed = seconds(lease.get("renewTime")) or 0.0
        return lease.get("holderIdentity") == pod["metadata"]["name"] and time.time() - renewed < LEASE_FRESH_SECONDS

    def api_server(self, up: bool) -> None:
        if up:
            self.cluster.start_process("kube-apiserver")
        else:
            self.cluster.stop_process("kube-apiserver")

    def storage_size(self, name: str) -> int:
        raise Broken("the cluster's volumes are folders of this machine's own disk, which must not be filled")

    # -- nodes --------------------------------------------------------------------------------------------------

    def node_number(self, name: str) -> int:
        state = self.cluster.require()
        for number in state.nodes:
            if state.plan.node_name(number) == name:
                return int(number)
        raise Broken(f"no node {name}")

    def slot_away_from_operator(self, job: str) -> tuple[int, int]:
        """(slot, node number) of a pod of the job on another node than the operator's, which is to see it break."""
        pods = {pod["spec"]["nodeName"]: int(pod["metadata"]["labels"]["trireme.dev/slot"]) for pod in self.pods(job)
                if not pod["metadata"].get("deletionTimestamp") and pod["spec"].get("nodeName")}  # fmt: skip
        operator = wait_until("the operator runs", self.operator_pod, 120)
        free = {node: slot for node, slot in pods.items() if node != operator["spec"]["nodeName"]}
        if not free:
            raise Broken("the whole gang lies on the operator's node: nothing can be broken apart from it")
        node, slot = max(free.items(), key=lambda item: item[1])
        return slot, self.node_number(node)
