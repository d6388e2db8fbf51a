"""Debian packages: installing what is missing, and unpacking into the cache what must not be installed.

etcd-server and containerd start services when installed. They are unpacked instead, from a private apt
state folder, so that nothing of the machine's own apt or service set-up changes.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

from .paths import cache_dir
from .report import ClusterError, say, step
from .shell import run, succeeds

RELEASE = "bookworm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
POLICY = Path("/usr/sbin/policy-rc.d")

# Program -> package, for what has no service of its own and is installed the ordinary way.
NODE_TOOLS = {
    "ip": "iproute2",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "nsenter": "util-linux",
    "mount": "mount",
    "openssl": "openssl",
    "gcc": "gcc",
}
BUILD_TOOLS = {"go": "golang-go", "rsync": "rsync", "jq": "jq", "make": "make", "gcc": "gcc", "dpkg-source": "dpkg-dev"}
# Unpacked into the cache: program -> (package, path inside the package).
UNPACKED = {
    "etcd": ("etcd-server", "usr/bin/etcd"),
    "containerd": ("containerd", "usr/bin/containerd"),
    "containerd-shim-runc-v2": ("containerd", "usr/bin/containerd-shim-runc-v2"),
    "ctr": ("containerd", "usr/bin/ctr"),
    "runc": ("runc", "usr/sbin/runc"),
    "ptp": ("containernetworking-plugins", "usr/lib/cni/ptp"),
}


def release_file(path: str = "/etc/os-release") -> Dict[str, str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip().strip('"') for key, value in pairs}


def require_debian(what: str) -> None:
    """Raise unless apt and a Debian-like system are here."""
    facts = release_file()
    if "debian" not in f"{facts.get('ID', '')} {facts.get('ID_LIKE', '')}".split() or shutil.which("apt-get") is None:
        raise ClusterError(
            f"{what} needs Debian (this is {facts.get('PRETTY_NAME', 'unknown')}): "
            "set KUBECONFIG to a cluster, or install Docker and kind"
        )


def missing(tools: Dict[str, str]) -> List[str]:
    """Packages of those programs that are not on the machine."""
    found_by = shutil.which
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"
    return sorted({package for program, package in tools.items() if found_by(program, path=path) is None})


def install(tools: Dict[str, str]) -> None:
    """Install the packages of missing programs; starts no service."""
    packages = missing(tools)
    if "gcc" in packages or ("gcc" in tools.values() and not Path("/usr/include/stdio.h").exists()):
        packages.append("libc6-dev")
    if not packages:
        return
    require_debian("installing " + " ".join(packages))
    if os.geteuid() != 0:
        raise ClusterError(f"missing packages: run as root, or first `apt-get install {' '.join(packages)}`")
    with step(f"installing {' '.join(packages)}"), _no_services():
        command = [
            "apt-get",
            "install",
            "-y",
            "-qq",
            "--no-install-recommends",
            "-o",
            "DPkg::Lock::Timeout=600",
            *packages,
        ]
        log = cache_dir() / "apt-install.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        try:
            run(command, log=log, env=quiet)
        except ClusterError:
            # Package lists are often absent or old on a fresh machine.
            run(["apt-get", "update", "-qq"], log=log, env=quiet)
            run(command, log=log, env=quiet)


@contextmanager
def _no_services() -> Iterator[None]:
    """invoke-rc.d asks this file before it starts anything; a policy the machine already has is left alone."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink()


class Source(NamedTuple):
    """One place packages come from, as the machine's own apt has it."""

    uri: str
    suites: List[str]
    components: List[str]
    signed_by: Optional[str]


def parse_one_line(text: str) -> List[Source]:
    """Sources of a sources.list file (`deb [options] uri suite component...`)."""
    sources = []
    for line in text.splitlines():
        match = re.match(r"^\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$", line.split("#")[0])
        if match:
            options, uri, suite, components = match.groups()
            key = re.search(r"signed-by=(\S+)", options or "", re.IGNORECASE)
            sources.append(Source(uri, [suite], components.split(), key.group(1) if key else None))
    return sources


def parse_deb822(text: str) -> List[Source]:
    """Sources of a .sources file (stanzas of `Field: value`)."""
    sources = []
    for stanza in re.split(r"\n\s*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#"))):
        fields = {k.lower(): v.strip() for k, v in re.findall(r"^([A-Za-z-]+):[ \t]*(.*)$", stanza, re.MULTILINE)}
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        key = fields.get("signed-by") or None
        for uri in fields.get("uris", "").split():
            sources.append(Source(uri, fields.get("suites", "").split(), fields.get("components", "").split(), key))
    return sources


def debian_mirror() -> Source:
    """The machine's own mirror of Debian main, whichever release the machine itself runs."""
    codename = release_file().get("VERSION_CODENAME", RELEASE)
    texts = [
        (parse_one_line, name)
        for name in ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*.list"))]
    ]
    texts += [(parse_deb822, name) for name in sorted(glob.glob("/etc/apt/sources.list.d/*.sources"))]
    for parse, name in texts:
        try:
            found = parse(Path(name).read_text())
        except OSError:
            continue
        for source in found:
            if codename in source.suites and "main" in source.components:
                return source
    raise ClusterError(
        f"no apt source for Debian {codename} main: add one to /etc/apt/sources.list, or set KUBEBUILDER_ASSETS"
    )


class PrivateApt:
    """apt with its own sources (deb-src included), lists and cache; the machine's own apt is not touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        mirror = debian_mirror()
        key = mirror.signed_by or KEYRING
        (root / "sources.list").write_text(
            "".join(f"{kind} [signed-by={key}] {mirror.uri} {RELEASE} main\n" for kind in ("deb", "deb-src"))
        )
        (root / "status").touch()
        self._options = [
            f"Dir::Etc::SourceList={root}/sources.list",
            "Dir::Etc::SourceParts=/dev/null",
            "Dir::Etc::Preferences=/dev/null",
            "Dir::Etc::PreferencesParts=/dev/null",
            f"Dir::State={root}",
            f"Dir::State::Lists={root}/lists",
            f"Dir::State::status={root}/status",
            f"Dir::Cache={root}/cache",
            "APT::Update::Post-Invoke-Success::=",
            "APT::Update::Post-Invoke::=",
            f"APT::Sandbox::User={'root' if os.geteuid() == 0 else ''}",
        ]
        run(self._command("apt-get", "update", "-qq"), log=root / "apt.log")

    def _command(self, program: str, *arguments: str) -> List[str]:
        return [program, *[word for option in self._options for word in ("-o", option)], *arguments]

    def download(self, packages: Sequence[str], folder: Path) -> List[Path]:
        """Fetch .deb files of the newest version into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        run(self._command("apt-get", "download", *packages), cwd=folder, log=self.root / "apt.log")
        return sorted(folder.glob("*.deb"))

    def source(self, package: str, folder: Path) -> Path:
        """Fetch and unpack a source package; returns its unpacked folder."""
        folder.mkdir(parents=True, exist_ok=True)
        run(self._command("apt-get", "source", "-qq", package), cwd=folder, log=self.root / "apt.log")
        folders = [path for path in folder.iterdir() if path.is_dir()]
        if len(folders) != 1:
            raise ClusterError(f"source package {package} did not unpack to one folder: see {self.root / 'apt.log'}")
        return folders[0]


def unpacked_root() -> Path:
    return cache_dir() / "debian" / RELEASE


def unpack_programs() -> Path:
    """Put etcd, containerd, runc and the CNI plugins under the cache; a no-op when they are there."""
    root = unpacked_root()
    if all((root / path).exists() for _, path in UNPACKED.values()):
        return root
    _unpack(sorted({package for package, _ in UNPACKED.values()}), root)
    if not succeeds(["ldconfig", "-p"]) or "libseccomp.so.2" not in run(["ldconfig", "-p"]):
        say("  note: libseccomp2 is not installed; runc needs it")
        install({"libseccomp.so.2": "libseccomp2"})
    return root


def unpack_prometheus() -> Path:
    """Put prometheus and promtool under the cache, apart from what a cluster needs; returns their folder."""
    root = unpacked_root().with_name(f"{RELEASE}-prometheus")
    if not (root / "usr/bin/promtool").exists():
        _unpack(["prometheus"], root)
    return root / "usr/bin"


def _unpack(packages: Sequence[str], root: Path) -> None:
    require_debian(" and ".join(packages))
    with step(f"fetching {' '.join(packages)}"):
        scratch = root.with_name(f"{root.name}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        debs = PrivateApt(cache_dir() / "apt").download(packages, scratch / "debs")
        for deb in debs:
            run(["dpkg-deb", "-x", str(deb), str(scratch)])
        shutil.rmtree(scratch / "debs")
        shutil.rmtree(root, ignore_errors=True)
        scratch.rename(root)
