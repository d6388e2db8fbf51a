"""Configuration files and command lines of one node's containerd, CNI, kubelet and kube-proxy. Pure text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

from .binaries import Binaries
from .control_plane import Timings
from .plan import Plan

PAUSE_IMAGE = "localhost/trireme-pause:1"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
# Paths that are fixed in the programs, or shorter this way than the 107 bytes a socket path may have. Inside the
# node's private mount namespace each is the node's own: kept on disk, or gone with the node as at a reboot.
ON_DISK = {
    "/var/lib/containerd": "containerd",
    "/var/lib/kubelet": "kubelet",
    "/var/log/pods": "pod-logs",
    "/var/log/containers": "container-logs",
}
IN_MEMORY = ("/run/containerd", "/run/netns", "/var/lib/cni")
# What the kubelet would otherwise set on the whole machine: it finds these values already there instead.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def mount_script(folder: Path, ready: Path) -> str:
    """Shell script that furnishes a node's mount namespace, says so by a file, and then holds it open."""
    lines = ["set -e"]
    for target, name in ON_DISK.items():
        lines.append(f"mount --bind '{folder / name}' {target}")
    lines += [f"mount -t tmpfs -o mode=0755 trireme {target}" for target in IN_MEMORY]
    for setting in KERNEL_SETTINGS:
        lines.append(
            f"[ ! -e /proc/sys/{setting} ] || mount --bind '{kernel_setting_file(folder, setting)}' /proc/sys/{setting}"
        )
    lines += [f"touch '{ready}'", "exec sleep infinity"]
    return "\n".join(lines)


def kernel_setting_file(folder: Path, setting: str) -> Path:
    return folder / "sys" / setting.replace("/", ".")


def containerd(folder: Path, binaries: Binaries, *, snapshotter: str, may_lower_oom_score: bool) -> str:
    """containerd's config.toml."""
    restrict = "false" if may_lower_oom_score else "true"
    return f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt",
  "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = {restrict}
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{binaries.path("runc")}"
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{binaries.cni}"
    conf_dir = "{folder}/cni"
"""


def cni(plan: Plan, number: int, mtu: int) -> str:
    """Pods are cabled point to point and routed, so that service addresses work between pods of one node too."""
    config = {
        "cniVersion": "0.4.0",
        "name": plan.name,
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": False,
                "mtu": mtu,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/var/lib/cni/networks",
                    "ranges": [[{"subnet": plan.pod_subnet(number)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
    return json.dumps(config, indent=1)


def kubelet(plan: Plan, number: int, pki: Path, folder: Path, timings: Timings, max_pods: int) -> str:
    """KubeletConfiguration (JSON is YAML). Images are only ever imported, so the kubelet must never delete one."""
    config: Dict[str, Any] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": plan.cgroup(number),
        "failSwapOn": False,
        "resolvConf": f"{folder}/resolv.conf",
        "clusterDomain": "cluster.local",
        "maxPods": max_pods,
        "volumePluginDir": f"{folder}/volume-plugins",
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
        },
        "healthzBindAddress": "127.0.0.1",
    }
    if timings.node_status is not None:
        config["nodeStatusUpdateFrequency"] = f"{timings.node_status}s"
        config["nodeStatusReportFrequency"] = f"{timings.node_status}s"
    if timings.node_grace is not None:
        # A lease is renewed after a quarter of its duration, which must fit several times into the grace period.
        config["nodeLeaseDurationSeconds"] = max(1, timings.node_grace)
    return json.dumps(config, indent=1)


def kubelet_command(
    binaries: Binaries, plan: Plan, number: int, pki: Path, folder: Path, version: Tuple[int, int]
) -> List[str]:
    argv = [
        binaries.path("kubelet"),
        f"--config={folder}/kubelet.json",
        f"--kubeconfig={pki}/{plan.node_name(number)}.kubeconfig",
        f"--hostname-override={plan.node_name(number)}",
        f"--node-ip={plan.node_address(number)}",
        f"--container-runtime-endpoint=unix://{CONTAINERD_SOCKET}",
    ]
    # Else the kubelet would look into a Docker that is the user's.
    if version < (1, 24):
        argv.append("--docker=unix:///run/containerd/no-docker-here.sock")
    # Gone in 1.27, when no other value was left.
    if version < (1, 27):
        argv.append("--container-runtime=remote")
    return argv


def proxy_command(binaries: Binaries, plan: Plan, number: int, pki: Path) -> List[str]:
    """kube-proxy; connection-tracking limits belong to the machine and are left alone."""
    return [
        binaries.path("kube-proxy"),
        f"--kubeconfig={pki}/proxy.kubeconfig",
        f"--hostname-override={plan.node_name(number)}",
        "--proxy-mode=iptables",
        f"--cluster-cidr={plan.pods}",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--oom-score-adj=0",
    ]
