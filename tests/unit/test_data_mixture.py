"""Sample N: each token of an epoch once, any place found without a walk, changed data refused."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_corpus import numbered, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from trireme_api.recipe import DataSource
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.mixture import Mixture

LENGTHS = [37, 5, 1, 80, 12, 64, 3, 9, 50, 22, 41, 17]


def source(path: Path | str, weight: float = 1.0) -> DataSource:
    return DataSource(path=str(path), weight=weight)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    block=st.integers(2, 20),
    seed=st.integers(0, 2**31 - 1),
    shard_tokens=st.integers(1, 200),
)
def test_an_epoch_holds_each_block_once_whatever_the_shards(
    lengths: list[int], block: int, seed: int, shard_tokens: int
) -> None:
    if sum(lengths) < block:
        lengths = [*lengths, block]
    with tempfile.TemporaryDirectory() as directory:
        documents = numbered(lengths)
        write_corpus(Path(directory), documents, vocabulary=5000, shard_tokens=shard_tokens)
        mixture = Mixture([source(directory)], block - 1, seed)
        blocks = mixture.blocks_per_epoch[0]
        assert blocks == sum(lengths) // block
        following = {a: b for ids in documents for a, b in itertools.pairwise(ids)}
        first_tokens = {ids[0] for ids in documents}
        for epoch in range(2):
            seen: list[int] = []
            for index in range(epoch * blocks, (epoch + 1) * blocks):
                sample = mixture.sample(index)
                assert sample.dtype == np.int64
                assert sample.shape == (block,)
                for a, b in zip(sample.tolist(), sample.tolist()[1:], strict=False):
                    assert b == following.get(a) if a in following else b in first_tokens, "whole documents, in turn"
                seen += sample.tolist()
            assert len(set(seen)) == len(seen) == blocks * block, "no token twice in an epoch"


def test_stream_is_the_documents_in_shuffled_order_with_only_the_remainder_dropped(tmp_path: Path) -> None:
    documents = numbered(LENGTHS)
    write_corpus(tmp_path, documents)
    mixture = Mixture([source(tmp_path)], 15, seed=3)
    blocks = {tuple(mixture.sample(i).tolist()) for i in range(mixture.blocks_per_epoch[0])}
    everything = {token for ids in documents for token in ids}
    missing = everything - {token for block in blocks for token in block}
    assert len(missing) == sum(LENGTHS) % 16


def test_seeking_equals_walking(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS))
    walker = Mixture([source(tmp_path)], 7, seed=1)
    walked = [walker.sample(i) for i in range(200)]
    for index in (199, 0, 43, 42, 198, 100):
        assert np.array_equal(Mixture([source(tmp_path)], 7, seed=1).sample(index), walked[index])
        assert np.array_equal(walker.sample(index), walked[index])


def test_epochs_seeds_and_sources_have_orders_of_their_own(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS))

    def epoch(mixture: Mixture, number: int) -> list[tuple[int, ...]]:
        blocks = mixture.blocks_per_epoch[0]
        return [tuple(mixture.sample(i).tolist()) for i in range(number * blocks, (number + 1) * blocks)]

    one, two = Mixture([source(tmp_path)], 7, seed=1), Mixture([source(tmp_path)], 7, seed=2)
    assert epoch(one, 0) != epoch(one, 1) != epoch(one, 2)
    assert set(epoch(one, 0)) != set(epoch(one, 1)), "documents are shuffled too, so blocks are cut elsewhere"
    assert epoch(one, 0) != epoch(two, 0)
    twice = Mixture([source(tmp_path), source(tmp_path)], 7, seed=1)
    assert not np.array_equal(twice.sample(0), twice.sample(1))


def test_sources_are_mixed_by_weight_each_in_epochs_of_its_own(tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small", numbered([40] * 3, first=10))
    large = write_corpus(tmp_path / "large", numbered([50] * 10, first=400))
    mixture = Mixture([source(small, 3), source(large, 1)], 9, seed=5)
    counts = [0, 0]
    for index in range(400):
        where, epoch, place = mixture.locate(index)
        assert epoch * mixture.blocks_per_epoch[where] + place == counts[where]
        counts[where] += 1
        assert (mixture.sample(index) < 400).all() == (where == 0)
        assert abs(counts[0] - (index + 1) * 0.75) < 1
    assert counts[0] > 20 * mixture.blocks_per_epoch[0]
    assert counts[1] > mixture.blocks_per_epoch[1]
    alone = Mixture([source(small)], 9, seed=5)
    mine = [mixture.sample(i) for i in range(40) if mixture.locate(i)[0] == 0]
    assert all(np.array_equal(a, alone.sample(i)) for i, a in enumerate(mine)), "a source's order is its own"


def test_wide_ids_survive(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[70000, 123456, 99999, 2] * 4], vocabulary=200000)
    assert sorted(set(Mixture([source(tmp_path)], 15, seed=0).sample(0).tolist())) == [2, 70000, 99999, 123456]


def test_held_out_blocks_are_in_order(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS), valid=numbered([10, 15], first=600))
    held_out = Mixture([source(tmp_path)], 7, seed=1).valid_blocks()
    assert len(held_out) == 3
    assert held_out[0].tolist() == list(range(600, 608))
    assert held_out[1].tolist() == list(range(608, 616))
    with pytest.raises(IndexError):
        held_out[3]


def test_a_corpus_smaller_than_a_block_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered([30]))
    with pytest.raises(DataError, match=r"30 tokens are less than one block of 33 \(data.sequenceLength \+ 1\)"):
        Mixture([source(tmp_path)], 32, seed=0)


def test_what_is_not_a_corpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.sources\[0\].path: .*absent: no such directory; make one with: trireme"):
        Mixture([source(tmp_path / "absent")], 7, seed=0)
    with pytest.raises(DataError, match=r"no manifest.json in it, so it is not a finished corpus"):
        Mixture([source(tmp_path)], 7, seed=0)
    monkeypatch.setenv("TRIREME_PVC_ROOT", str(tmp_path))
    with pytest.raises(DataError, match=r"data.sources\[0\].path: pvc://corpus/en: claim 'corpus' is not mounted"):
        Mixture([source("pvc://corpus/en")], 7, seed=0)


def test_a_truncated_shard_is_refused_at_open(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS))
    shard = tmp_path / "train-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00000.tokens: truncated: 680 bytes, the manifest says 682; restore it"):
        Mixture([source(tmp_path)], 7, seed=0)


def test_a_missing_shard_is_refused_at_open(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS))
    (tmp_path / "train-00000.lengths").unlink()
    with pytest.raises(DataError, match=r"train-00000.lengths: missing"):
        Mixture([source(tmp_path)], 7, seed=0)


@pytest.mark.parametrize("name", ["train-00000.tokens", "valid-00000.tokens", "train-00000.lengths"])
def test_one_flipped_bit_is_found_when_verifying(tmp_path: Path, name: str) -> None:
    write_corpus(tmp_path, numbered(LENGTHS), valid=numbered([9]))
    raw = bytearray((tmp_path / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=rf"{name}: corrupt"):
        Mixture([source(tmp_path)], 7, seed=0, verify=True)


def test_an_id_outside_the_vocabulary_is_refused_when_read(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS))
    shard = tmp_path / "train-00000.tokens"
    raw = bytearray(shard.read_bytes())
    raw[101] ^= 0x80
    shard.write_bytes(raw)
    mixture = Mixture([source(tmp_path)], 7, seed=0)
    with pytest.raises(DataError, match=r"token id 32\d\d\d in a vocabulary of 1000: a shard is corrupt"):
        [mixture.sample(index) for index in range(mixture.blocks_per_epoch[0])]


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, numbered(LENGTHS))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["train"]["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the fingerprint does not fit"):
        Mixture([source(tmp_path)], 7, seed=0)
    manifest["version"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="format version 99, this trireme reads 1"):
        Mixture([source(tmp_path)], 7, seed=0)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Mixture([source(tmp_path)], 7, seed=0)


def test_sources_of_different_tokenizers_do_not_mix(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", numbered(LENGTHS))
    two = write_corpus(tmp_path / "two", numbered(LENGTHS), tokenizer=b'{"other": 1}')
    says = r"^data.sources\[1\].path: .*two was made with another tokenizer than .*one; prepare it again with --token"
    with pytest.raises(DataError, match=says):
        Mixture([source(one), source(two)], 7, seed=0)


def test_changed_data_are_noticed_and_moved_data_are_not(tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "one", numbered(LENGTHS))
    copy = write_corpus(tmp_path / "copy", numbered(LENGTHS))
    other = write_corpus(tmp_path / "other", numbered(LENGTHS, first=11))
    saved = json.loads(json.dumps(Mixture([source(one)], 7, seed=1).identity))
    assert Mixture([source(copy)], 7, seed=1).changes_since(saved) == []
    assert Mixture([source(copy)], 7, seed=1).fingerprint == Mixture([source(one)], 7, seed=1).fingerprint
    changed = Mixture([source(other)], 7, seed=1)
    assert changed.fingerprint != Mixture([source(one)], 7, seed=1).fingerprint
    [line] = changed.changes_since(saved)
    assert line.startswith(f"data.sources[0].path {other}: the data have changed")
    for different in (
        Mixture([source(one)], 8, seed=1),
        Mixture([source(one)], 7, seed=2),
        Mixture([source(one), source(one)], 7, seed=1),
    ):
        assert len(different.changes_since(saved)) == 1
        assert different.fingerprint != Mixture([source(one)], 7, seed=1).fingerprint
