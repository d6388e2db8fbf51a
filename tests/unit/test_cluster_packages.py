from __future__ import annotations

import pytest
from localcluster import build
from localcluster.binaries import find, parse_version
from localcluster.debian import Source, parse_deb822, parse_one_line
from localcluster.report import ClusterError


def test_one_line_sources() -> None:
    text = """# comment
deb http://mirror.example/debian bookworm main contrib   # trailing
deb [arch=amd64 signed-by=/k.gpg] https://other.example/debian bookworm-updates main
deb-src http://mirror.example/debian bookworm main
#deb http://off.example/debian bookworm main
"""
    assert parse_one_line(text) == [
        Source("http://mirror.example/debian", ["bookworm"], ["main", "contrib"], None),
        Source("https://other.example/debian", ["bookworm-updates"], ["main"], "/k.gpg"),
    ]


def test_deb822_sources() -> None:
    text = """Types: deb deb-src
URIs: http://one.example/debian http://two.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /k.gpg

# Types: deb
Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://src.example/debian
Suites: bookworm
Components: main
"""
    suites = ["bookworm", "bookworm-updates"]
    assert parse_deb822(text) == [
        Source("http://one.example/debian", suites, ["main"], "/k.gpg"),
        Source("http://two.example/debian", suites, ["main"], "/k.gpg"),
    ]


def test_versions() -> None:
    assert parse_version("Kubernetes v1.20.2\n") == (1, 20)
    assert parse_version("Kubernetes v1.34.0-rc.1") == (1, 34)
    with pytest.raises(ClusterError, match="no version"):
        parse_version("hello")


def test_prebuilt_programs_that_are_incomplete_are_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "kube-apiserver").write_text("")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(ClusterError, match=r"KUBEBUILDER_ASSETS.*lacks kube-controller-manager.*kube-proxy"):
        find(nodes=True)


def test_prebuilt_programs_are_enough_for_an_api_server(tmp_path, monkeypatch) -> None:
    for name in ("kube-apiserver", "etcd"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    monkeypatch.setenv("TRIREME_CACHE", str(tmp_path / "empty"))
    programs = find(nodes=False)
    assert programs.path("etcd") == str(tmp_path / "etcd")
    assert not (tmp_path / "empty").exists()


def test_too_little_space_is_told_before_anything_is_done(tmp_path) -> None:
    with pytest.raises(ClusterError, match=r"building needs .* GB free under .*TRIREME_CACHE"):
        build.require_space(tmp_path, 1 << 60, "building")
