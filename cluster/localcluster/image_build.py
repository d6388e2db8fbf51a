"""Building images from Dockerfiles with whichever builder is there: Docker's when its daemon answers, else buildah.

buildah works in a store of its own in the cache: the user's images are neither read nor touched. It runs build steps
by chroot, which needs no more rights than root has inside a container.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional

from . import archive, backend, base_image, debian, dockerfile, image_prune, pip_settings
from .paths import cache_dir
from .report import ClusterError, say, step
from .shell import environment, run, succeeds

DOCKER, BUILDAH = "docker", "buildah"


def builder() -> str:
    """The one that is there; installs buildah when neither is."""
    if backend.docker_daemon():
        return DOCKER
    debian.install({"buildah": "buildah"})
    return BUILDAH


class Buildah:
    """buildah on its own store."""

    def __init__(self) -> None:
        store = cache_dir() / "buildah"
        (store / "run").mkdir(parents=True, exist_ok=True)
        self.store = store
        self.policy = store / "policy.json"
        # Without the containers-common package there is no policy, and buildah refuses everything.
        self.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}\n')

    def command(self, verb: str, *arguments: str) -> List[str]:
        return [
            "buildah",
            "--root",
            str(self.store / "storage"),
            "--runroot",
            str(self.store / "run"),
            "--storage-driver",
            storage_driver(),
            verb,
            *arguments,
        ]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One build at a time in this store: pruning takes whatever no finished image needs."""
        with open(self.store / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def has(self, image: str) -> bool:
        return succeeds(self.command("inspect", "--type", "image", image))

    def push(self, tag: str) -> List[str]:
        """The command; a registry on this machine itself may speak plain HTTP, as Docker has it too."""
        plain = ["--tls-verify=false"] if dockerfile.registry(tag).split(":")[0] in ("localhost", "127.0.0.1") else []
        policy = f"--signature-policy={self.policy}"
        return self.command("push", "--quiet", policy, *plain, tag, f"docker://{tag}")

    def write(self, tag: str, output: Path) -> None:
        """As an OCI archive, whole or not at all."""
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = output.with_name(output.name + ".new")
        scratch.unlink(missing_ok=True)
        policy = f"--signature-policy={self.policy}"
        run(self.command("push", "--quiet", policy, tag, f"oci-archive:{scratch}:{tag}"))
        scratch.rename(output)

    def base(self) -> str:
        """Name of the base image that needs no registry, made when it is not there."""
        name = base_image.tag()
        if not self.has(name):
            tar = base_image.rootfs()
            with step(f"importing {name}"):
                container = run(self.command("from", "scratch")).strip()
                try:
                    run(self.command("add", "--quiet", container, str(tar), "/"))
                    run(
                        self.command(
                            "config",
                            "--env",
                            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                            "--env",
                            "LANG=C.UTF-8",
                            "--cmd",
                            "python3",
                            container,
                        )
                    )
                    run(self.command("commit", "--quiet", container, name))
                finally:
                    run(self.command("rm", container))
            run(self.command("tag", name, f"{base_image.NAME}:latest"))
        return name


def storage_driver() -> str:
    kind = run(["stat", "--file-system", "--format=%T", str(cache_dir())]).strip()
    return "vfs" if kind == "overlayfs" else "overlay"


def registry_answers(image: str, timeout: float = 4.0) -> bool:
    """True when the registry of this image speaks to us; a proxy's own error page is not an answer."""
    try:
        urllib.request.urlopen(f"https://{dockerfile.registry(image)}/v2/", timeout=timeout).close()
        return True
    except urllib.error.HTTPError as error:
        return error.code == 401 and "docker-distribution-api-version" in {name.lower() for name in error.headers}
    except (OSError, ValueError):
        return False


def build(
    file: Path,
    tag: str,
    output: Optional[Path],
    given: Mapping[str, str],
    context: Optional[Path] = None,
    push: bool = False,
) -> Dict[str, str]:
    """Build `file` as `tag`; with `output` write an archive that `load-image` takes, with `push` send it to its
    registry. Returns tag, builder, base.

    The base argument of `FROM ${NAME}` keeps its public default where that registry can be reached, and becomes the
    bootstrapped base image where it cannot; give it with --build-arg to decide yourself.
    """
    if not file.is_file():
        raise ClusterError(f"{file} does not exist: give the path of a Dockerfile")
    text = file.read_text()
    tool = builder()
    values, base = dict(given), ""
    settings = pip_settings.of_this_machine()
    declared = dockerfile.arguments(text)
    offered = settings.build_arguments()
    if tool == DOCKER:
        # Docker's builder binds no folder of this machine, so only what needs none is of use to it.
        offered = {name: value for name, value in offered.items() if pip_settings.INSIDE not in value}
    values = {**dockerfile.used(declared, offered), **values}
    buildah = Buildah() if tool == BUILDAH else None
    if ":" not in tag.rsplit("/", 1)[-1]:
        tag += ":latest"
    with buildah.alone() if buildah is not None else nullcontext():
        argument = dockerfile.base_argument(text)
        if buildah is not None and argument is not None and argument not in given:
            default = declared.get(argument)
            if default is None or not (buildah.has(default) or registry_answers(default)):
                base = values[argument] = buildah.base()
                say(f"  {argument}={base} (the registry of {default or 'the base image'} does not answer)")
        where = context or file.parent
        with step(f"building {tag} with {tool}"):
            if buildah is None:
                _docker(file, where, tag, values, output)
            else:
                _buildah(buildah, file, where, tag, values, settings)
        if buildah is not None:
            image_prune.prune(buildah, tag)
        if push:
            with step(f"pushing {tag}"):
                run(["docker", "push", "--quiet", tag] if buildah is None else buildah.push(tag), timeout=3600)
        if output is not None and buildah is not None:
            with step(f"writing {output}"):
                buildah.write(tag, output)
    if output is not None and tag not in archive.images(output):
        raise ClusterError(f"{output} holds {', '.join(archive.images(output))}, not {tag}")
    return {"tag": tag, "builder": tool, "base": base}


def _buildah(
    buildah: Buildah, file: Path, context: Path, tag: str, values: Mapping[str, str], settings: pip_settings.PipSettings
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip_conf = Path(scratch) / "pip.conf"
        pip_conf.write_text(settings.pip_conf())
        volumes = [f"{pip_conf}:/etc/pip.conf:ro", *(f"{outside}:{inside}:ro" for outside, inside in settings.mounts)]
        _stream(
            buildah.command(
                "bud",
                "--isolation",
                "chroot",
                "--network",
                "host",
                "--layers",
                f"--signature-policy={buildah.policy}",
                *[word for volume in volumes for word in ("--volume", volume)],
                *[word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")],
                "--tag",
                tag,
                "--file",
                str(file),
                str(context),
            ),
            tag,
        )


def _docker(file: Path, context: Path, tag: str, values: Mapping[str, str], output: Optional[Path]) -> None:
    arguments = [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]
    _stream(["docker", "build", *arguments, "--tag", tag, "--file", str(file), str(context)], tag)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        run(["docker", "save", "--output", str(output), tag])


def _stream(argv: List[str], tag: str) -> None:
    """A build is long, so its lines are shown as they come, on stderr."""
    code = subprocess.call(argv, env=environment(), stdout=sys.stderr, stdin=subprocess.DEVNULL)
    if code != 0:
        raise ClusterError(f"building {tag} failed with exit code {code}: see the lines above")
