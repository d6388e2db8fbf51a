from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from localcluster import archive, dockerfile, image_prune
from localcluster.pip_settings import INSIDE, from_options, parse_config_list
from localcluster.report import ClusterError


def write(path: Path, files: dict[str, object]) -> Path:
    with tarfile.open(path, "w") as sink:
        for name, value in files.items():
            content = json.dumps(value).encode()
            sink.addfile(archive.tar_entry(name, len(content)), io.BytesIO(content))
    return path


def test_a_written_archive_is_read_back_and_reproducible(tmp_path: Path) -> None:
    one = archive.write(tmp_path / "one.tar", "localhost/x:1", b"layer" * 300, entrypoint=["/x"])
    two = archive.write(tmp_path / "two.tar", "localhost/x:1", b"layer" * 300, entrypoint=["/x"])
    assert one == two
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert archive.images(tmp_path / "one.tar") == {"localhost/x:1": one}


def test_names_of_archives_of_other_tools(tmp_path: Path) -> None:
    notes = {archive.REF_NAME: "1", archive.CONTAINERD_NAME: "docker.io/library/x:1"}
    docker = {"manifests": [{"digest": "sha256:1", "annotations": notes}]}
    assert archive.images(write(tmp_path / "a", {"index.json": docker})) == {"docker.io/library/x:1": "sha256:1"}
    old = [{"RepoTags": ["x:1", "x:latest"]}]
    assert archive.images(write(tmp_path / "b", {"manifest.json": old})) == {"x:1": None, "x:latest": None}


@pytest.mark.parametrize("files", [{"index.json": {"manifests": [{"digest": "d"}]}}, {"manifest.json": [{}]}, {"x": 1}])
def test_an_archive_without_a_named_image_is_refused(tmp_path: Path, files: dict[str, object]) -> None:
    with pytest.raises(ClusterError):
        archive.images(write(tmp_path / "a", files))


def test_what_is_no_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "absent", tmp_path):
        with pytest.raises(ClusterError) as caught:
            archive.images(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


DOCKERFILE = """# FROM ${NOT_THIS}
ARG BASE_IMAGE=docker.io/library/python:3.11-slim
ARG PIP_CERT \\
    OTHER="a"
FROM --platform=linux/amd64 ${BASE_IMAGE} AS build
ARG BASE_IMAGE
FROM scratch
"""


def test_build_arguments_and_base() -> None:
    found = dockerfile.arguments(DOCKERFILE)
    assert found == {"BASE_IMAGE": "docker.io/library/python:3.11-slim", "PIP_CERT": None, "OTHER": "a"}
    assert dockerfile.base_argument(DOCKERFILE) == "BASE_IMAGE"
    assert dockerfile.base_argument("FROM debian:12\n") is None
    assert dockerfile.base_argument("FROM registry.example/${NAME}:1\n") is None
    assert dockerfile.used(found, {"PIP_CERT": "x", "PIP_PROXY": "y"}) == {"PIP_CERT": "x"}


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("python:3.11", "registry-1.docker.io"),
        ("library/python", "registry-1.docker.io"),
        ("ghcr.io/a/b:1", "ghcr.io"),
        ("localhost:5000/a", "localhost:5000"),
    ],
)
def test_registry_of_an_image(image: str, host: str) -> None:
    assert dockerfile.registry(image) == host


def test_pip_settings_point_into_the_build(tmp_path: Path) -> None:
    wheels, index, bundle = tmp_path / "wheels", tmp_path / "mirror" / "simple", tmp_path / "ca.crt"
    wheels.mkdir()
    index.mkdir(parents=True)
    bundle.write_text("")
    text = (
        f":env:.find-links='{wheels}'\n:env:.cert='{bundle}'\nglobal.cert='/elsewhere'\n"
        f"global.extra-index-url='file://{index} https://pypi.example/simple'\nglobal.timeout='60'\n"
        "freeze.timeout='1'\nglobal.disable-pip-version-check='1'\nglobal.client-cert='/absent/key'\n"
    )
    settings = from_options(parse_config_list(text))
    outside = dict(settings.mounts)
    assert set(outside) == {str(wheels), str(index.parent), str(bundle)}
    assert all(inside.startswith(INSIDE + "/") for inside in outside.values())
    assert settings.settings["find-links"] == [outside[str(wheels)]]
    assert settings.settings["cert"] == [outside[str(bundle)]]
    assert settings.settings["extra-index-url"] == [
        f"file://{outside[str(index.parent)]}/simple",
        "https://pypi.example/simple",
    ]
    assert settings.settings["timeout"] == ["60"]
    assert "client-cert" not in settings.settings
    assert "disable-pip-version-check" not in settings.settings
    assert str(tmp_path) not in settings.pip_conf()
    assert settings.build_arguments()["PIP_CERT"] == outside[str(bundle)]


def test_no_pip_settings_at_all_are_fine() -> None:
    settings = from_options(parse_config_list(""))
    assert settings.pip_conf() == "[global]\n"
    assert (settings.mounts, settings.build_arguments()) == ([], {})


def listed(name: str, created: str) -> dict[str, object]:
    return {"id": created, "names": [name], "createdatraw": created}


def test_pruning_keeps_the_newest_tags_of_each_name() -> None:
    images = [
        listed("localhost/trireme/trainer:a", "2026-01-01T00:00:00Z"),
        listed("localhost/trireme/trainer:b", "2026-01-03T00:00:00Z"),
        listed("localhost/trireme/trainer:c", "2026-01-02T00:00:00Z"),
        listed("localhost/trireme/operator:a", "2025-01-01T00:00:00Z"),
        listed("localhost/trireme-base:latest", "2025-01-01T00:00:00Z"),
        {"id": "x", "names": None, "createdatraw": "2025-01-01T00:00:00Z"},
    ]
    old = image_prune.outdated(images, "localhost/trireme/trainer:c", keep=2)
    assert old == ["localhost/trireme/trainer:a"]
    assert image_prune.outdated(images, "localhost/trireme/trainer:a", keep=1) == [
        "localhost/trireme/trainer:c",
        "localhost/trireme/trainer:b",
    ]
    assert image_prune.outdated(images, "localhost/trireme/operator:a") == []


@pytest.mark.parametrize(
    ("tag", "name"),
    [("a/b:1", "a/b"), ("localhost:5000/a/b:1", "localhost:5000/a/b"), ("localhost:5000/a", "localhost:5000/a")],
)
def test_the_name_of_a_tag(tag: str, name: str) -> None:
    assert image_prune.repository(tag) == name
