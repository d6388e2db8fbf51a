"""The project's images: built when what they are made of has changed; imported where missing, or pushed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo.delivery import LOCAL
from demo.kube import ROOT
from demo.report import DemoError


@dataclass(frozen=True)
class Image:
    name: str
    inputs: tuple[str, ...]
    """Files and folders copied into the image, besides its own folder under images/."""

    @property
    def dockerfile(self) -> Path:
        return ROOT / "images" / self.name / "Dockerfile"

    @property
    def placeholder(self) -> str:
        """The name in the local overlay; what is built is named after its content instead."""
        return f"{LOCAL}/{self.name}:dev"


@dataclass(frozen=True)
class Built:
    """A new content is a new name, so that a Deployment that names it rolls over by itself."""

    image: Image
    key: str
    prefix: str = LOCAL

    @property
    def tag(self) -> str:
        return f"{self.prefix}/{self.image.name}:{self.key}"

    @property
    def archive(self) -> Path:
        return archive_folder() / f"{self.image.name}-{self.key}.tar"


PINS = ("pyproject.toml", "constraints.txt", "images/requirements.py", "LICENSE")
IMAGES = (
    Image("operator", ("api/trireme_api", "operator/trireme_operator", *PINS)),
    Image("agent", ("api/trireme_api", "trainer/trireme_agent", "LICENSE")),
    Image("trainer", ("api/trireme_api", "trainer/trireme_agent", "trainer/trireme_trainer", "cli/trireme_cli", *PINS)),
)


def files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for inner in sorted(path.rglob("*")) if path.is_dir() else ():
        if inner.is_file() and "__pycache__" not in inner.parts:
            yield inner


def key(image: Image, root: Path = ROOT) -> str:
    """Changes with the content or the place of anything that goes into the image."""
    digest = hashlib.sha256(image.name.encode())
    for name in (f"images/{image.name}", *sorted(image.inputs)):
        found = list(files(root / name))
        if not found:
            raise DemoError(f"{name}: is not there, but images/{image.name}/Dockerfile copies it")
        for path in found:
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_mode & 0o111}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def archive_folder() -> Path:
    cache = Path(os.environ.get("TRIREME_CACHE") or Path.home() / ".cache" / "trireme")
    return cache / "images"


def build(image: Image, prefix: str = LOCAL, push: bool = False) -> Built:
    """Builds the image and pushes it, or keeps it as an archive and builds only where there is none of its content.

    Whether a registry still has an image only the registry knows; building from unchanged layers and pushing what it
    has takes seconds.
    """
    built = Built(image, key(image), prefix)
    common = [str(image.dockerfile), "--context", str(ROOT), "--tag", built.tag]
    common += ["--build-arg", f"REVISION={revision()}"]
    if push:
        cluster_tool("images.py", "build", *common, "--push")
        return built
    if not built.archive.exists():
        cluster_tool("images.py", "build", *common, "--output", str(built.archive))
    for old in archive_folder().glob(f"{image.name}-*.tar"):
        if old != built.archive:
            old.unlink()
    return built


def revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def build_all(prefix: str = LOCAL, push: bool = False) -> list[Built]:
    return [build(image, prefix, push) for image in IMAGES]


def named(prefix: str) -> list[Built]:
    """What building would make, by name alone."""
    return [Built(image, key(image), prefix) for image in IMAGES]


def with_built_images(manifests: str, built: Sequence[Built], pull_policy: str) -> str:
    """Rendered manifests with the placeholders replaced by what was built, and how nodes are to come by it."""
    names = {one.image.placeholder: one.tag for one in built}
    documents = [document for document in yaml.safe_load_all(manifests) if document]
    for document in documents:
        if document["kind"] != "Deployment":
            continue
        for container in document["spec"]["template"]["spec"]["containers"]:
            if container["image"] not in names:
                continue
            container["image"] = names[container["image"]]
            container["imagePullPolicy"] = pull_policy
            for entry in container.get("env", []):
                if entry["name"] == "TRIREME_IMAGE_PULL_POLICY":
                    entry["value"] = pull_policy
                elif "value" in entry:
                    entry["value"] = names.get(entry["value"], entry["value"])
    return yaml.safe_dump_all(documents, sort_keys=False)


def load(built: Sequence[Built]) -> None:
    """Imports into every node what the node does not have."""
    cluster_tool("cluster.py", "load-image", *(str(one.archive) for one in built))


def cluster_tool(script: str, *arguments: str, data: bool = False) -> Any:
    """Runs one of cluster/'s commands; its own lines (indented) go to the terminal, with `data` its JSON is returned.

    A builder's many lines are kept in a log and shown only when it fails.
    """
    command = [sys.executable, str(ROOT / "cluster" / script), *arguments, *(["--json"] if data else [])]
    log: deque[str] = deque(maxlen=25)
    with (
        tempfile.TemporaryFile("w+") as answer,
        subprocess.Popen(command, stdout=answer, stderr=subprocess.PIPE, text=True, errors="replace") as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if line.startswith("  ") and line[2:3].strip() and "args were not consumed" not in line:
                print(line, end="", file=sys.stderr, flush=True)
        if process.wait():
            print("".join(log), end="", file=sys.stderr)
            raise DemoError(f"cluster/{script} {arguments[0]} failed (see above)")
        answer.seek(0)
        return json.load(answer) if data else None
