"""etcd and an API server alone, on loopback: what API tests need. No root, no namespaces, many at once.

from localcluster.apiserver import ApiServer
with ApiServer(tmp_path) as server:
    client = ...(server.kubeconfig)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from . import binaries, control_plane, credentials, processes
from .api import Api, wait
from .report import ClusterError
from .state import Process

SERVICES = "10.0.0.0/24"


class ApiServer:
    """One etcd and one kube-apiserver in `folder`.

    port                 0 picks free ones (of this machine's loopback)
    controllers          also run the controller manager: garbage collection, namespaces, service accounts
    extra                further kube-apiserver flags

    Without controllers nothing makes the service accounts that pods ask for, so that admission check is off then.
    """

    def __init__(self, folder: Path, *, port: int = 0, controllers: bool = False, extra: Sequence[str] = ()) -> None:
        self.folder = Path(folder).absolute()
        self.port = port
        self.controllers = controllers
        self.extra = list(extra)
        self.processes: Dict[str, Process] = {}
        self._owner = f"{self.folder}"
        self._command_lines: Dict[str, List[str]] = {}

    @property
    def kubeconfig(self) -> Path:
        """The admin's kubeconfig."""
        return self.folder / "kubeconfig"

    @property
    def record(self) -> Path:
        return self.folder / "control-plane.json"

    def start(self) -> "ApiServer":
        """Start and wait until ready; returns itself. Raises ClusterError when it is running or does not start."""
        if any(processes.alive(process) for process in self._recorded().values()):
            raise ClusterError(f"an API server already runs in {self.folder}: stop it first")
        programs = binaries.find(nodes=False)
        pki = self.folder / "pki"
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)
        credentials.make_authority(pki)
        credentials.make_certificate(
            pki, "apiserver", "/CN=kube-apiserver", addresses=["127.0.0.1"], names=["localhost"]
        )
        tokens = credentials.make_tokens(pki, [])
        etcd_port, peer_port, api_port = free_ports(3)
        self.port = self.port or api_port
        server = f"https://127.0.0.1:{self.port}"
        manager = "system:kube-controller-manager"
        for path, user in ((self.kubeconfig, credentials.ADMIN), (pki / "controller-manager.kubeconfig", manager)):
            credentials.write_kubeconfig(
                path,
                server=server,
                authority=pki / "ca.crt",
                token=tokens[user],
                cluster="control-plane-only",
                user=user,
            )
        flags = list(self.extra) if self.controllers else [*self.extra, "--disable-admission-plugins=ServiceAccount"]
        self._command_lines = {
            control_plane.ETCD: control_plane.etcd(
                programs, self.folder / "etcd", client_port=etcd_port, peer_port=peer_port
            ),
            control_plane.API_SERVER: control_plane.api_server(
                programs,
                pki,
                etcd_port=etcd_port,
                port=self.port,
                bind="127.0.0.1",
                services=SERVICES,
                advertise=None,
                extra=flags,
            ),
        }
        if self.controllers:
            self._command_lines[control_plane.CONTROLLER_MANAGER] = [
                *control_plane.controller_manager(programs, pki, programs.version()),
                f"--secure-port={free_ports(1)[0]}",
                *(["--port=0"] if programs.version() < (1, 24) else []),
            ]
        try:
            for name in self._command_lines:
                self.start_process(name)
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def start_process(self, name: str) -> None:
        """Start one of etcd, kube-apiserver, kube-controller-manager (again), with its data as it was."""
        if not self._command_lines:
            self._command_lines = {key: process.argv for key, process in self._recorded().items()}
        if name not in self._command_lines:
            raise ClusterError(
                f"no process {name!r} here: there are {', '.join(sorted(self._command_lines)) or 'none'}"
            )
        self.processes[name] = processes.start(
            self._command_lines[name], self.folder / f"{name}.log", owner=self._owner
        )
        self.record.write_text(json.dumps({key: asdict(process) for key, process in self.processes.items()}))

    def kill_process(self, name: str) -> None:
        """SIGKILL one of them, for tests of what happens then."""
        processes.kill((self.processes or self._recorded())[name], signal.SIGKILL)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Until the API server answers and its bootstrap roles are there."""
        api = Api(self.kubeconfig)
        wait(api.ready, "kube-apiserver", timeout, failed=self._failure)

    def stop(self) -> None:
        """End the processes and remove etcd's data; logs and keys stay. Does nothing when none runs."""
        for process in [*self._recorded().values(), *self.processes.values()]:
            processes.kill(process)
        self.processes = {}
        self.record.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def __enter__(self) -> "ApiServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _recorded(self) -> Dict[str, Process]:
        try:
            return {name: Process(**entry) for name, entry in json.loads(self.record.read_text()).items()}
        except (OSError, ValueError, TypeError):
            return {}

    def _failure(self) -> Optional[str]:
        for name, process in self.processes.items():
            if not processes.alive(process):
                return f"{name} ended while starting: see {process.log}"
        return None


def free_ports(count: int) -> List[int]:
    """Ports of loopback that nothing listens on, all different."""
    sockets = []
    try:
        for _ in range(count):
            probe = socket.socket()
            sockets.append(probe)
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def default_folder(port: int) -> Path:
    """Where `cluster.py control-plane-only` keeps an instance when no --dir is given."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / f"trireme-control-plane-{os.getuid()}-{port}"
