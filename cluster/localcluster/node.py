"""One node: a network namespace, a private mount namespace, and in them containerd, kubelet and kube-proxy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import archive, cgroups, netns, node_config, pause, processes
from .api import wait
from .binaries import Binaries
from .control_plane import Timings
from .paths import ClusterPaths
from .report import ClusterError
from .shell import run, succeeds
from .state import Process, State

HOLDER, CONTAINERD, KUBELET, PROXY = "namespaces", "containerd", "kubelet", "kube-proxy"
ROLES = (HOLDER, CONTAINERD, KUBELET, PROXY)
CAP_SYS_RESOURCE = 24


class Node:
    """Node `number` of a cluster; the record of what runs is kept in `state`, which the caller saves."""

    def __init__(self, paths: ClusterPaths, state: State, binaries: Binaries, number: int) -> None:
        self.paths, self.state, self.binaries, self.number = paths, state, binaries, number
        self.plan = state.plan
        self.folder = paths.node(number)
        self.owner = str(paths.state)

    @property
    def name(self) -> str:
        return self.plan.node_name(self.number)

    def process_name(self, role: str) -> str:
        return f"{role}-{self.number}"

    def running(self, role: str) -> Optional[Process]:
        process = self.state.processes.get(self.process_name(role))
        return process if process is not None and processes.alive(process) else None

    def prepare(self) -> None:
        """Write the node's configuration and make its folders and cgroup. Safe to repeat."""
        folder = self.folder
        for name in (*node_config.ON_DISK.values(), "sys", "cni", "volume-plugins"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for setting, value in node_config.KERNEL_SETTINGS.items():
            node_config.kernel_setting_file(folder, setting).write_text(value + "\n")
        options = self.state.options
        (folder / "containerd.toml").write_text(
            node_config.containerd(
                folder,
                self.binaries,
                snapshotter=snapshotter(folder),
                may_lower_oom_score=has_capability(CAP_SYS_RESOURCE),
            )
        )
        (folder / "cni" / "10-pods.conflist").write_text(node_config.cni(self.plan, self.number, netns.MTU))
        (folder / "resolv.conf").write_text("# This cluster has no DNS, and nothing here may ask the outside world.\n")
        (folder / "kubelet.json").write_text(
            node_config.kubelet(
                self.plan,
                self.number,
                self.paths.pki,
                folder,
                Timings.from_options(options),
                int(options.get("max_pods") or 110),
            )
        )
        cgroups.create(self.plan.cgroup(self.number))

    def start(self, version: Tuple[int, int]) -> None:
        """Start whatever of the node does not run; returns when containerd answers and has the pause image."""
        if self.running(HOLDER) is None:
            # A new mount namespace is a reboot: what ran in the old one must be gone first.
            self.kill_everything()
            self._make_mount_points()
            ready = self.folder / "furnished"
            ready.unlink(missing_ok=True)
            script = node_config.mount_script(self.folder, ready)
            enter = netns.enter(
                self.plan.node_namespace(self.number),
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            )
            self._start(HOLDER, enter)
            wait(ready.exists, f"mount namespace of {self.name}", 20, failed=self._ended(HOLDER))
        self.start_containerd()
        pki = self.paths.pki
        if self.running(KUBELET) is None:
            self._start(
                KUBELET,
                self._enter(
                    node_config.kubelet_command(self.binaries, self.plan, self.number, pki, self.folder, version)
                ),
            )
        if self.running(PROXY) is None:
            self._start(PROXY, self._enter(node_config.proxy_command(self.binaries, self.plan, self.number, pki)))

    def start_containerd(self) -> None:
        if self.running(CONTAINERD) is None:
            command = [self.binaries.path("containerd"), "--config", f"{self.folder}/containerd.toml"]
            self._start(CONTAINERD, self._enter(command), env={"PATH": self.binaries.search_path})
        wait(lambda: succeeds(self.ctr("version")), f"containerd of {self.name}", 30, failed=self._ended(CONTAINERD))
        if node_config.PAUSE_IMAGE not in self.images():
            self.load(pause.image())

    def power_off(self) -> int:
        """End the node as if its plug was pulled; returns how many processes there were."""
        for role in ROLES:
            process = self.state.processes.get(self.process_name(role))
            if process is not None:
                process.stopped = True
        return self.kill_everything()

    def kill_everything(self) -> int:
        """SIGKILL all that belongs to the node: recorded, marked (shims) and in its cgroup (containers)."""
        count = 0
        # Twice, because a shim may have started a container while the first round went on.
        for _ in range(2):
            victims = set(processes.marked(self.owner, self.number)) | cgroups.members(self.plan.cgroup(self.number))
            count += processes.kill_all(victims)
        return count

    def ctr(self, *arguments: str) -> List[str]:
        """Command line of containerd's own client on this node."""
        return self._enter(
            [self.binaries.path("ctr"), "--address", node_config.CONTAINERD_SOCKET, "--namespace", "k8s.io", *arguments]
        )

    def images(self) -> Dict[str, str]:
        """Digest by image name, as containerd has them."""
        found = {}
        for line in run(self.ctr("images", "list")).splitlines()[1:]:
            columns = line.split()
            if len(columns) >= 3:
                found[columns[0]] = columns[2]
        return found

    def load(self, path: Path) -> bool:
        """Import an archive unless containerd has those very images; True when it was imported."""
        wanted = archive.images(path)
        present = self.images()
        if all(digest is not None and present.get(name) == digest for name, digest in wanted.items()):
            return False
        run(self.ctr("images", "import", "--snapshotter", snapshotter(self.folder), str(path.absolute())), timeout=600)
        absent = sorted(set(wanted) - set(self.images()))
        if absent:
            raise ClusterError(
                f"{path}: containerd of {self.name} imported it under other names than {', '.join(absent)}"
            )
        return True

    def _start(self, role: str, argv: List[str], env: Optional[Dict[str, str]] = None) -> None:
        name = self.process_name(role)
        self.state.processes[name] = processes.start(
            argv, self.paths.logs / f"{name}.log", owner=self.owner, node=self.number, env=env
        )
        # Saved at once: a crash of this program must not leave processes that nobody has written down.
        self.state.save(self.paths.record)

    def _enter(self, argv: List[str]) -> List[str]:
        holder = self.running(HOLDER)
        if holder is None:
            raise ClusterError(f"{self.name} is switched off: `cluster.py node-start {self.number}` first")
        network = netns.FOLDER / self.plan.node_namespace(self.number)
        return ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", f"--net={network}", "--", *argv]

    def _ended(self, role: str) -> Callable[[], Optional[str]]:
        def check() -> Optional[str]:
            process = self.state.processes[self.process_name(role)]
            return (
                None if processes.alive(process) else f"{role} of {self.name} ended while starting: see {process.log}"
            )

        return check

    def _make_mount_points(self) -> None:
        """Folders of the machine that the node's own are bound over; those we had to make are removed by `down`."""
        for target in (*node_config.ON_DISK, *node_config.IN_MEMORY):
            for folder in reversed([Path(target), *Path(target).parents]):
                if not folder.exists():
                    folder.mkdir()
                    self.state.made_directories.append(str(folder))


def snapshotter(folder: Path) -> str:
    """overlayfs, or plain copies where the state folder itself lies on an overlay (in a container)."""
    kind = run(["stat", "--file-system", "--format=%T", str(folder)]).strip()
    return "native" if kind == "overlayfs" else "overlayfs"


def has_capability(bit: int) -> bool:
    """Whether this process holds a kernel capability."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


def remove_folder(folder: Path) -> None:
    """Remove a node's folder, with whatever a crash left mounted below it on the machine's side."""
    if not folder.exists():
        return
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        run(["umount", "--lazy", mount])
    # Pods may have set files immutable or folders unreadable; as root rmtree only fails on the former.
    shutil.rmtree(folder, onerror=_make_writable)


def _make_writable(function: Callable[[str], object], path: str, _: Any) -> None:
    succeeds(["chattr", "-i", path])
    os.chmod(os.path.dirname(path), 0o700)
    function(path)
