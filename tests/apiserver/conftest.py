from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cluster"), str(Path(__file__).parent)]

from localcluster.api import Api  # noqa: E402
from localcluster.apiserver import ApiServer  # noqa: E402
from rig import KubeletStandIn, OperatorProcess, World, add_namespace, add_node, eventually  # noqa: E402
from trireme_api.crd import crd, strip_cel  # noqa: E402

NODES = ("node-a", "node-b", "node-c")
ROOM = {"cpu": "64", "memory": "256Gi", "pods": "500", "nvidia.com/gpu": "8"}
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real etcd and API server with the CRD and three empty nodes; no controllers, no garbage collector."""
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as running:
        api = Api(running.kubeconfig)
        version = api.request("GET", "/version")
        knows_cel = (int(version["major"]), int(version["minor"].rstrip("+"))) >= (1, 25)
        definition = crd() if knows_cel else strip_cel(crd())
        api.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        add_namespace(api, "trireme-system")
        for node in NODES:
            add_node(api, node, ROOM)
        yield running


@pytest.fixture
def world(server: ApiServer) -> World:
    """A fresh namespace with its service account."""
    api = Api(server.kubeconfig)
    found = World(api, server.kubeconfig, f"t{next(_numbers)}-{int(time.time()) % 100000}")
    add_namespace(api, found.namespace)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    api.request("POST", f"/api/v1/namespaces/{found.namespace}/serviceaccounts", account)
    eventually(found.served, "the TrainingJob resource is served")
    return found


@pytest.fixture
def operators(world: World, tmp_path: Path) -> Iterator[Callable[..., OperatorProcess]]:
    """Makes operators of this namespace; all are killed at the end."""
    made: list[OperatorProcess] = []

    def make(identity: str = "operator", *flags: str, start: bool = True) -> OperatorProcess:
        one = OperatorProcess(world, tmp_path, identity, flags)
        made.append(one)
        return one.start() if start else one

    yield make
    for one in made:
        one.kill()
        print(f"--- {one.log.name}\n{one.log.read_text()[-4000:] if one.log.exists() else ''}")


@pytest.fixture
def kubelet(world: World, tmp_path: Path) -> Iterator[Callable[..., KubeletStandIn]]:
    made: list[KubeletStandIn] = []

    def make(*, run: bool = False, pause: float = 0.15, nodes: tuple[str, ...] = NODES) -> KubeletStandIn:
        one = KubeletStandIn(world, tmp_path, list(nodes), run=run, pause=pause)
        made.append(one)
        return one.__enter__()

    yield make
    for one in made:
        one.__exit__()
        print("--- kubelet stand-in", one.errors[-3:])
        for uid, name in one.names.items():
            print(f"--- {name}\n{(tmp_path / uid / 'output').read_text()[-1500:]}")
