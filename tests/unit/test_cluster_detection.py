from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from localcluster import backend
from localcluster.backend import BUILTIN, EXISTING, KIND, decide

OWN = Path("/repo/.cluster/kubeconfig")


@pytest.mark.parametrize(("has_kind", "has_daemon"), itertools.product([False, True], repeat=2))
def test_a_kubeconfig_of_the_user_always_wins(has_kind: bool, has_daemon: bool) -> None:
    choice = decide({"KUBECONFIG": "/home/u/k"}, own_kubeconfig=OWN, has_kind=has_kind, has_daemon=has_daemon)
    assert choice.kind == EXISTING
    assert "/home/u/k" in choice.reason


def test_our_own_kubeconfig_is_no_foreign_cluster() -> None:
    choice = decide({"KUBECONFIG": str(OWN)}, own_kubeconfig=OWN, has_kind=False, has_daemon=False)
    assert choice.kind == BUILTIN
    several = decide({"KUBECONFIG": f"{OWN}:/other"}, own_kubeconfig=OWN, has_kind=False, has_daemon=False)
    assert several.kind == BUILTIN


@pytest.mark.parametrize(
    ("has_kind", "has_daemon", "expected"),
    [(True, True, KIND), (True, False, BUILTIN), (False, True, BUILTIN), (False, False, BUILTIN)],
)
def test_kind_needs_its_daemon_too(has_kind: bool, has_daemon: bool, expected: str) -> None:
    choice = decide({}, own_kubeconfig=OWN, has_kind=has_kind, has_daemon=has_daemon)
    assert choice.kind == expected


def test_what_is_lacking_is_named() -> None:
    assert "no Docker daemon" in decide({}, own_kubeconfig=OWN, has_kind=True, has_daemon=False).reason


def test_a_docker_command_without_a_daemon_is_no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert not backend.docker_daemon()
    docker.write_text("#!/bin/sh\necho 28.0\n")
    assert backend.docker_daemon()
