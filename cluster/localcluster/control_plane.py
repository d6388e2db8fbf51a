"""Command lines of etcd, the API server, the controller manager and the scheduler. Pure apart from file names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import credentials
from .binaries import Binaries
from .plan import API_PORT, Plan

ETCD = "etcd"
API_SERVER = "kube-apiserver"
CONTROLLER_MANAGER = "kube-controller-manager"
SCHEDULER = "kube-scheduler"
ISSUER = "https://kubernetes.default.svc"


@dataclass(frozen=True)
class Timings:
    """Node-loss timings in seconds; None leaves Kubernetes' default (10, 40, 300)."""

    node_status: Optional[int] = None
    node_grace: Optional[int] = None
    eviction: Optional[int] = None

    @classmethod
    def from_options(cls, options: Dict[str, Any]) -> "Timings":
        return cls(options.get("node_status"), options.get("node_grace"), options.get("eviction"))


def etcd(binaries: Binaries, data: Path, *, client_port: int, peer_port: int, name: str = "local") -> List[str]:
    """etcd without fsync: the cluster does not outlive its machine anyway, and everything is faster for it."""
    peer = f"http://127.0.0.1:{peer_port}"
    client = f"http://127.0.0.1:{client_port}"
    return [
        binaries.path(ETCD),
        f"--name={name}",
        f"--data-dir={data}",
        "--unsafe-no-fsync",
        "--logger=zap",
        "--log-level=warn",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster={name}={peer}",
        "--listen-metrics-urls=",
    ]


def api_server(
    binaries: Binaries,
    pki: Path,
    *,
    etcd_port: int,
    port: int,
    bind: str,
    services: str,
    advertise: Optional[str],
    timings: Timings = Timings(),
    extra: Sequence[str] = (),
) -> List[str]:
    """The API server with RBAC, token files, TokenReview and projected service-account tokens.

    advertise: address that pods reach it by; None for one without nodes, which then publishes no endpoint.
    """
    argv = [
        binaries.path(API_SERVER),
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--secure-port={port}",
        f"--bind-address={bind}",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        f"--token-auth-file={pki}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged=true",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-signing-key-file={pki}/sa.key",
        f"--service-account-key-file={pki}/sa.pub",
        f"--service-cluster-ip-range={services}",
        "--enable-admission-plugins=NodeRestriction",
    ]
    if advertise is None:
        argv += ["--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none"]
    else:
        argv += [
            f"--advertise-address={advertise}",
            # Node names resolve nowhere, so logs and exec must go by address.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={pki}/kubelet-client.crt",
            f"--kubelet-client-key={pki}/kubelet-client.key",
        ]
    if timings.eviction is not None:
        argv += [
            f"--default-not-ready-toleration-seconds={timings.eviction}",
            f"--default-unreachable-toleration-seconds={timings.eviction}",
        ]
    return [*argv, *extra]


def controller_manager(
    binaries: Binaries, pki: Path, version: Tuple[int, int], timings: Timings = Timings()
) -> List[str]:
    argv = [
        binaries.path(CONTROLLER_MANAGER),
        f"--kubeconfig={pki}/controller-manager.kubeconfig",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        "--bind-address=127.0.0.1",
        f"--root-ca-file={pki}/ca.crt",
        f"--service-account-private-key-file={pki}/sa.key",
        f"--cluster-signing-cert-file={pki}/ca.crt",
        f"--cluster-signing-key-file={pki}/ca.key",
    ]
    if timings.node_grace is not None:
        argv += [
            f"--node-monitor-grace-period={timings.node_grace}s",
            f"--node-monitor-period={max(1, timings.node_grace // 8)}s",
        ]
    # Since 1.27 the tolerations that the API server adds are the only clock.
    if timings.eviction is not None and version < (1, 27):
        argv.append(f"--pod-eviction-timeout={timings.eviction}s")
    return argv


def scheduler(binaries: Binaries, pki: Path) -> List[str]:
    return [
        binaries.path(SCHEDULER),
        f"--kubeconfig={pki}/scheduler.kubeconfig",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
    ]


def make_credentials(pki: Path, plan: Plan, nodes: Sequence[int]) -> None:
    """All keys, tokens and internal kubeconfigs of a cluster with nodes."""
    credentials.make_authority(pki)
    credentials.make_certificate(
        pki,
        "apiserver",
        "/CN=kube-apiserver",
        addresses=["127.0.0.1", plan.control_address, plan.kubernetes_service],
        names=[
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ],
    )
    credentials.make_certificate(pki, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    tokens = credentials.make_tokens(pki, [plan.node_name(number) for number in nodes])
    users = {
        "controller-manager": "system:kube-controller-manager",
        "scheduler": "system:kube-scheduler",
        "proxy": "system:kube-proxy",
    }
    users.update({plan.node_name(number): credentials.node_user(plan.node_name(number)) for number in nodes})
    for file, user in users.items():
        credentials.write_kubeconfig(
            pki / f"{file}.kubeconfig",
            server=f"https://{plan.control_address}:{API_PORT}",
            authority=pki / "ca.crt",
            token=tokens[user],
            cluster=plan.name,
            user=user,
        )
