from __future__ import annotations

import os
from pathlib import Path

import pytest
from trireme_api.protocol import Env
from trireme_trainer.storage import StorageError, is_local, open_filesystem, resolve_path


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "corpus").mkdir()
    monkeypatch.setenv(Env.PVC_ROOT, str(tmp_path))
    return tmp_path


def test_claim_resolves_below_the_mount(mounts: Path) -> None:
    assert resolve_path("pvc://corpus/en/wiki") == str(mounts / "corpus" / "en" / "wiki")
    assert resolve_path("pvc://corpus") == str(mounts / "corpus")
    assert resolve_path("pvc://corpus/") == str(mounts / "corpus")


def test_without_environment_claims_are_under_mnt_pvc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(Env.PVC_ROOT, raising=False)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/mnt/pvc/corpus")
    assert resolve_path("pvc://corpus/en") == "/mnt/pvc/corpus/en"


def test_claim_that_is_not_mounted_is_named_with_the_remedy(mounts: Path) -> None:
    with pytest.raises(StorageError, match=r"pvc://nowhere/x: claim 'nowhere' is not mounted at .*; create the claim"):
        resolve_path("pvc://nowhere/x")


@pytest.mark.parametrize("uri", ["pvc://corpus/../../etc", "pvc:///x", "pvc://Corpus/x", "pvc://-a/x", ""])
def test_malformed_uris_are_refused(mounts: Path, uri: str) -> None:
    with pytest.raises(StorageError):
        resolve_path(uri)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("data/en") == str(tmp_path / "data" / "en")
    assert resolve_path(f"file://{tmp_path}/x") == str(tmp_path / "x")


def test_urls_pass_through() -> None:
    assert resolve_path("s3://bucket/key") == "s3://bucket/key"
    assert not is_local("s3://bucket/key")
    assert is_local("pvc://corpus/en")
    assert is_local("a/b")


def test_filesystem_of_a_claim_a_url_and_an_unknown_scheme(mounts: Path) -> None:
    filesystem, path = open_filesystem("pvc://corpus/en")
    assert path == str(mounts / "corpus" / "en")
    assert filesystem.exists(str(mounts / "corpus"))
    assert open_filesystem("memory://x/y")[0].protocol == "memory"
    with pytest.raises(StorageError, match=r"nosuch://a/b: no scheme is called 'nosuch'; write e\.g\. pvc://"):
        open_filesystem("nosuch://a/b")
