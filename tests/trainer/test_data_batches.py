"""A step's global batch is the same set of samples in any world, dealt out once, padded evenly."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trireme_api.recipe import Recipe
from trireme_trainer.data.batches import IGNORED, Share, TextBatches
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.mixture import Mixture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
from data_corpus import numbered, write_corpus

LENGTH = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", numbered([37, 5, 1, 80, 12, 64, 3, 9, 50, 22]))


def recipe(corpus: str, sequences: int, micro: int = 1) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"preset": "opt-8m"},
            "data": {"sources": [{"path": corpus}], "sequenceLength": LENGTH},
            "batch": {"tokens": sequences * LENGTH, "micro": micro},
            "until": {"steps": 10},
            "seed": 3,
        }
    )


def rows(batches: list, keep_padding: bool = False) -> list[tuple[int, ...]]:
    """Each counted sequence as its T + 1 tokens."""
    found = []
    for batch in batches:
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            if (targets == IGNORED).all():
                continue
            assert (targets != IGNORED).all()
            assert torch.equal(tokens[1:], targets[:-1])
            found.append((*tokens.tolist(), int(targets[-1])))
    return found


@settings(max_examples=40)
@given(st.integers(1, 24), st.integers(1, 9), st.integers(1, 8), st.integers(0, 50))
def test_the_union_over_ranks_is_the_global_batch(
    corpus: str, sequences: int, world: int, micro: int, step: int
) -> None:
    spec = recipe(corpus, sequences, micro)
    mixture = Mixture.from_recipe(spec)
    wanted = [tuple(mixture.sample(step * sequences + i).tolist()) for i in range(sequences)]
    found, shapes = [], set()
    for rank in range(world):
        with TextBatches(mixture, spec, rank, world) as batches:
            mine = batches.micro_batches(step)
        shapes.add(tuple(batch.tokens.shape for batch in mine))
        assert all(batch.tokens.shape == batch.targets.shape for batch in mine)
        assert all(batch.tokens.shape[0] <= micro and batch.tokens.dtype == torch.int64 for batch in mine)
        found += rows(mine)
    assert sorted(found) == sorted(wanted)
    assert len(shapes) == 1, "every rank goes through the same collectives"
    counted = sum(shape[0] for shape in shapes.pop()) * world
    assert counted - sequences < world * (Share(sequences, world, micro).micro_batches + 1), "little padding"


@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 40))
def test_no_rank_has_two_more_sequences_than_another(sequences: int, world: int, micro: int) -> None:
    share = Share(sequences, world, micro)
    counts = [sum(n is not None for numbers in share.of(rank) for n in numbers) for rank in range(world)]
    assert sum(counts) == sequences
    assert max(counts) - min(counts) <= 1


def test_no_padding_where_the_batch_divides() -> None:
    assert Share(16, 4, 2).of(1) == [[1, 5], [9, 13]]
    assert Share(16, 4, 8).micro_sequences == 4


def test_any_step_in_any_order_equals_one_after_another(corpus: str) -> None:
    spec = recipe(corpus, 6, 2)
    mixture = Mixture.from_recipe(spec)
    with TextBatches(mixture, spec, 1, 2) as batches:
        walked = [rows(batches.micro_batches(step)) for step in range(30)]
    with TextBatches(Mixture.from_recipe(spec), spec, 1, 2) as batches:
        for step in (29, 5, 6, 7, 0, 28, 5):
            assert rows(batches.micro_batches(step)) == walked[step]


def test_the_next_step_is_made_in_the_background_and_waiting_is_measured(corpus: str) -> None:
    spec = recipe(corpus, 2)
    mixture = Mixture.from_recipe(spec)
    sample, asked = mixture.sample, []

    def slow(index: int) -> np.ndarray:
        asked.append((index, threading.current_thread().name))
        time.sleep(0.05)
        return sample(index)

    mixture.sample = slow  # type: ignore[method-assign]
    with TextBatches(mixture, spec, 0, 1) as batches:
        batches.micro_batches(0)
        assert batches.last_wait_seconds >= 0.1, "nothing was ready for the first step"
        time.sleep(0.3)
        assert [(i, name.startswith("prefetch")) for i, name in asked[2:4]] == [(2, True), (3, True)]
        batches.micro_batches(1)
        assert batches.last_wait_seconds < 0.05


def test_an_error_of_the_thread_reaches_the_step_that_needed_it(corpus: str) -> None:
    spec = recipe(corpus, 2)
    mixture = Mixture.from_recipe(spec)
    sample = mixture.sample

    def failing(index: int) -> np.ndarray:
        if index >= 2:
            raise DataError("shard gone")
        return sample(index)

    mixture.sample = failing  # type: ignore[method-assign]
    with TextBatches(mixture, spec, 0, 1) as batches:
        batches.micro_batches(0)
        with pytest.raises(DataError, match="shard gone"):
            batches.micro_batches(1)
