"""What the machine must offer for the built-in cluster, each lack told in one line with its remedy."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from . import cgroups, debian
from .apiserver import free_ports
from .plan import API_PORT
from .report import ClusterError
from .shell import succeeds


def require_root() -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            "network namespaces, mounts and cgroups need root: run with sudo, or set KUBECONFIG to a cluster"
        )


def check_machine() -> None:
    """Raise with one line when namespaces, mounts or cgroups cannot be made here."""
    if not sys.platform.startswith("linux"):
        raise ClusterError(
            f"the built-in cluster needs Linux, this is {sys.platform}: set KUBECONFIG, or install Docker and kind"
        )
    debian.require_debian("the built-in cluster")
    cgroups.require()
    if not Path("/dev/kmsg").exists():
        raise ClusterError("/dev/kmsg is missing, which kubelets read: in a container, run it with --device /dev/kmsg")
    if shutil.which("unshare") is not None and not succeeds(["unshare", "--net", "--mount", "true"]):
        raise ClusterError(
            "cannot make namespaces (capability SYS_ADMIN is missing): in a container, run it with --privileged"
        )


def host_port(wanted: int) -> int:
    """The port on this machine's loopback: the one asked for, else 6443, else any free one."""
    if wanted and not port_is_free(wanted):
        raise ClusterError(f"--port {wanted} is in use on 127.0.0.1: choose another or leave it out")
    if wanted:
        return wanted
    return API_PORT if port_is_free(API_PORT) else free_ports(1)[0]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
