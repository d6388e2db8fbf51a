"""Shared by the tests of the training loop."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Ranks and pytest share two cores with others: one thread each, in the reference loop too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gang import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))
