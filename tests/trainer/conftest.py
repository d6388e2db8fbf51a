"""Shared by the tests of the training loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Ranks and pytest share two cores with others: one thread each, in the reference loop too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gang import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


MEGA_BATCHES = 3


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three directories mega-1 to mega-3 of one text, one tokenizer."""
    from trireme_trainer.data.prepare import Options, prepare

    root = tmp_path_factory.mktemp("stream")
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text().split("\n\n")
    options: dict[str, Any] = {"vocabulary": 384}
    for number in range(1, MEGA_BATCHES + 1):
        (root / f"{number}.txt").write_text("\n\n".join(text[number - 1 :: MEGA_BATCHES]))
        made = Options(separator="blank-line", valid_fraction=0.2, **options)
        prepare([str(root / f"{number}.txt")], str(root / f"mega-{number}"), made)
        options = {"tokenizer": str(root / "mega-1" / "tokenizer.json")}
    return root
