"""A corpus behind a URL is copied once, verified, and kept by fingerprint."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from data_corpus import numbered, write_corpus
from trireme_api.recipe import DataSource
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.remote import CACHE_ENV, local_copy


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    write_corpus(tmp_path / "corpus", numbered([30, 40, 50]))
    memory, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    memory.put(str(tmp_path / "corpus"), base, recursive=True)
    yield f"memory:/{base}"
    memory.rm(base, recursive=True)


def test_samples_are_those_of_the_original(url: str, tmp_path: Path) -> None:
    far = Mixture([DataSource(path=url)], 7, seed=1)
    near = Mixture([DataSource(path=str(tmp_path / "corpus"))], 7, seed=1)
    assert far.fingerprint == near.fingerprint
    assert all(np.array_equal(far.sample(i), near.sample(i)) for i in range(30))


def test_a_second_open_copies_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    fetched, real = [], memory.get_file

    def get_file(source: str, target: str) -> None:
        fetched.append(source.rsplit("/", 1)[1])
        real(source, target)

    monkeypatch.setattr(type(memory), "get_file", staticmethod(get_file))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(local_copy, [url] * 4))
    assert len(found) == 1
    assert sorted(fetched) == ["tokenizer.json", "train-00000.lengths", "train-00000.tokens"]
    local_copy(url)
    assert len(fetched) == 3


def test_a_damaged_or_missing_file_is_named_and_not_kept(url: str) -> None:
    memory = fsspec.filesystem("memory")
    path = url.removeprefix("memory:/") + "/train-00000.tokens"
    good = memory.cat_file(path)
    memory.pipe_file(path, good[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"memory://.*: train-00000.tokens is corrupt"):
        local_copy(url)
    memory.rm(path)
    with pytest.raises(DataError, match=r"train-00000.tokens is missing"):
        local_copy(url)
    memory.pipe_file(path, good)
    assert Mixture([DataSource(path=url)], 7, seed=1).blocks_per_epoch == [15]


def test_no_corpus_there(url: str) -> None:
    with pytest.raises(DataError, match=r"memory://nowhere/manifest.json: not there; make it with: trireme prepare"):
        local_copy("memory://nowhere")
    with pytest.raises(DataError, match=r"data.sources\[0\].path: nosuch://x"):
        Mixture([DataSource(path="nosuch://x")], 7, seed=1)
