"""Text to shards: what is written, that it is the same every time, that being killed anywhere changes nothing."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from trireme_trainer.data import prepare as prepare_module
from trireme_trainer.data import writer
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import read_manifest
from trireme_trainer.data.prepare import Options, prepare
from trireme_trainer.data.shards import Corpus
from trireme_trainer.data.tokenizer.byte_bpe import JsonEncoder
from trireme_trainer.data.workspace import discard

OPTIONS = Options(vocabulary=320, valid_fraction=0.1, shard_tokens=400)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    top = tmp_path / "texts"
    top.mkdir()
    for i in range(40):
        sentences = [f"Rower {i * j} pulls oar {j} in rank {i}. " for j in range(i % 7 + 3)]
        (top / f"{i:02d}.txt").write_text("".join(sentences))
    return top


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_what_is_written_is_the_text(texts: Path, tmp_path: Path) -> None:
    prepared = prepare([str(texts)], str(tmp_path / "out"), OPTIONS)
    manifest = read_manifest(str(tmp_path / "out"))
    assert prepared.fresh
    assert prepared.manifest == manifest
    assert (manifest.documents, manifest.valid.documents) == (40, 4)
    assert len(manifest.train.shards) > 3
    assert all(shard.tokens >= 400 for shard in manifest.train.shards[:-1])
    corpus = Corpus(str(tmp_path / "out"), verify=True)
    encoder = JsonEncoder((tmp_path / "out" / "tokenizer.json").read_text(), "out")
    found, counts = [], Counter[int]()
    for documents in (corpus.train, corpus.valid):
        for number in range(len(documents)):
            ids = documents.read(number, 0, int(documents.lengths[number])).tolist()
            assert ids[-1] == 2
            found.append(encoder.decode(ids[:-1]))
            if documents is corpus.train:
                counts.update(ids)
    assert sorted(found) == sorted(path.read_text().rstrip() for path in texts.iterdir())
    total = counts.total()
    assert manifest.train.tokens == total
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert manifest.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    train_bytes = sum(len(text.encode()) for text in found[: len(corpus.train)])
    assert manifest.bytes_per_token == pytest.approx(train_bytes / total, rel=1e-12)
    assert not (tmp_path / "out" / ".prepare").exists()


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(texts: Path, tmp_path: Path) -> None:
    prepare([str(texts)], str(tmp_path / "one"), OPTIONS)
    texts.rename(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        os.utime(path, (1, 1))
    prepare([str(tmp_path / "elsewhere")], str(tmp_path / "two"), OPTIONS)
    assert content(tmp_path / "one") == content(tmp_path / "two")


class _Killed(BaseException):
    """Like a kill: nothing catches it."""


def _kill_at(patch: pytest.MonkeyPatch, place: int) -> Callable[[], int]:
    """From the `place`-th rename on, every rename fails; returns a function that counts them."""
    real, seen = os.replace, 0

    def replace(source: str, target: str) -> None:
        nonlocal seen
        seen += 1
        if seen >= place:
            raise _Killed
        real(source, target)

    patch.setattr(writer.os, "replace", replace)
    return lambda: seen


def test_killed_at_any_write_the_next_run_ends_the_same(texts: Path, tmp_path: Path) -> None:
    prepare([str(texts)], str(tmp_path / "whole"), OPTIONS)
    whole = content(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        count = _kill_at(patch, 10**9)
        prepare([str(texts)], str(tmp_path / "counted"), OPTIONS)
        writes = count()
    assert writes > 20
    kept = []
    for place in range(1, writes + 1):
        out = tmp_path / f"out-{place}"
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(patch, place)
            with pytest.raises(_Killed):
                prepare([str(texts)], str(out), OPTIONS)
        assert not (out / "manifest.json").exists(), "nothing is published before the end"
        kept.append(prepare([str(texts)], str(out), OPTIONS).shards_kept)
        assert content(out) == whole, place
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == len(list((tmp_path / "whole").glob("*.tokens")))


def test_sigkill_in_the_middle_and_again(texts: Path, tmp_path: Path) -> None:
    prepare([str(texts)], str(tmp_path / "whole"), OPTIONS)
    out = tmp_path / "out"
    script = (
        "import os, sys, time; from trireme_trainer.data import writer; from trireme_trainer.data.prepare import *\n"
        "real = os.fsync\n"
        "def slow(fd): time.sleep(0.02); real(fd)\n"
        "os.fsync = slow\n"
        "prepare([sys.argv[1]], sys.argv[2], Options(vocabulary=320, valid_fraction=0.1, shard_tokens=400))"
    )
    for shards in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", script, str(texts), str(out)])
        deadline = time.monotonic() + 60
        while len(list(out.glob("train-*.tokens"))) < shards:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    assert prepare([str(texts)], str(out), OPTIONS).shards_kept >= 3
    assert content(out) == content(tmp_path / "whole")


def test_a_shard_damaged_since_is_made_again_and_said_so(texts: Path, tmp_path: Path) -> None:
    prepare([str(texts)], str(tmp_path / "whole"), OPTIONS)
    out, notices = tmp_path / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module._Preparation, "_publish", _raise)
        with pytest.raises(_Killed):
            prepare([str(texts)], str(out), OPTIONS)
    shard = out / "train-00001.tokens"
    raw = bytearray(shard.read_bytes())
    raw[7] ^= 4
    shard.write_bytes(raw)
    prepared = prepare([str(texts)], str(out), OPTIONS, notice=notices.append)
    assert notices == ["train-00001: damaged since it was written; making it again"]
    assert prepared.shards_kept == 2
    assert content(out) == content(tmp_path / "whole")


def _raise(*_: object) -> None:
    raise _Killed


def test_done_is_done_and_other_work_is_not_overwritten(texts: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    prepare([str(texts)], out, OPTIONS)
    before = content(tmp_path / "out")
    again = prepare([str(texts)], out, OPTIONS)
    assert not again.fresh
    with pytest.raises(DataError, match=r"holds a corpus made from other input or options; .* --overwrite"):
        prepare([str(texts)], out, Options(vocabulary=330, valid_fraction=0.1, shard_tokens=400))
    (texts / "00.txt").write_text("changed")
    with pytest.raises(DataError, match="holds a corpus made from other input or options"):
        prepare([str(texts)], out, OPTIONS)
    assert content(tmp_path / "out") == before
    discard(out)
    assert content(tmp_path / "out") == {}
    assert prepare([str(texts)], out, OPTIONS).fresh
    assert content(tmp_path / "out") != before


def test_unfinished_work_of_other_input_is_not_continued(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module._Preparation, "_publish", _raise)
        with pytest.raises(_Killed):
            prepare([str(texts)], str(out), OPTIONS)
    (texts / "00.txt").write_text("changed")
    with pytest.raises(DataError, match="holds an unfinished corpus of other or changed input or options"):
        prepare([str(texts)], str(out), OPTIONS)
    discard(str(out))
    assert prepare([str(texts)], str(out), OPTIONS).fresh


def test_discard_leaves_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("manifest.json", "train-00000.tokens", "valid-00000.lengths.partial", "train-notes.txt", "README"):
        (tmp_path / name).write_text("x")
    discard(str(tmp_path))
    assert sorted(content(tmp_path)) == ["README", "train-notes.txt"]


def test_a_bad_file_leaves_nothing_behind_and_mending_it_is_enough(texts: Path, tmp_path: Path) -> None:
    (texts / "17.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"17.txt: byte 0xff at offset 3 is not UTF-8"):
        prepare([str(texts)], str(tmp_path / "out"), OPTIONS)
    assert not (tmp_path / "out").exists()
    (texts / "17.txt").write_text("ok")
    assert prepare([str(texts)], str(tmp_path / "out"), OPTIONS).fresh


def test_an_output_that_cannot_be_used(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file.*: cannot be written \(Not a directory\)"):
        prepare([str(texts)], str(tmp_path / "file" / "out"), OPTIONS)
    with pytest.raises(DataError, match=r"texts: is not empty \(00.txt\); give an empty or new directory as --output"):
        prepare([str(texts / "00.txt")], str(texts), OPTIONS)
    with pytest.raises(DataError, match=r"--output s3://x/y: must be a local path or pvc://claim/dir"):
        prepare([str(texts)], "s3://x/y", OPTIONS)
    monkeypatch.setenv("TRIREME_PVC_ROOT", str(tmp_path))
    with pytest.raises(DataError, match=r"--output pvc://absent/x: claim 'absent' is not mounted"):
        prepare([str(texts)], "pvc://absent/x", OPTIONS)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(texts: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        real, calls = os.fsync, 0

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            full(descriptor) if calls > 12 else real(descriptor)

        patch.setattr(writer.os, "fsync", fsync)
        with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
            prepare([str(texts)], out, OPTIONS)
    assert prepare([str(texts)], out, OPTIONS).fresh


def test_two_at_once_are_kept_apart(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another trireme prepare is writing here"):
        prepare([str(texts)], str(out), OPTIONS)
    os.close(descriptor)
    assert prepare([str(texts)], str(out), OPTIONS).fresh


def test_input_that_changes_under_way_is_not_published(texts: Path, tmp_path: Path) -> None:
    def change(*args: object) -> None:
        (texts / "03.txt").write_text("something else altogether")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module._Preparation, "_tokenizer_texts", lambda self, scan: (change(), iter(["a"]))[1])
        with pytest.raises(DataError, match="the input changed while it was being read"):
            prepare([str(texts)], str(tmp_path / "out"), OPTIONS)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_given_tokenizer_is_used_and_kept_as_it_is(texts: Path, tmp_path: Path) -> None:
    prepare([str(texts)], str(tmp_path / "one"), OPTIONS)
    given = tmp_path / "one" / "tokenizer.json"
    options = Options(tokenizer=str(given), valid_fraction=0.1, shard_tokens=400)
    prepare([str(texts)], str(tmp_path / "two"), options)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert {k: v for k, v in one.items() if k != "manifest.json"} == {
        k: v for k, v in two.items() if k != "manifest.json"
    }
    assert read_manifest(str(tmp_path / "one")).fingerprint == read_manifest(str(tmp_path / "two")).fingerprint
    with pytest.raises(DataError, match=r"--tokenizer .*absent: cannot be read \(No such file or directory\)"):
        prepare([str(texts)], str(tmp_path / "three"), Options(tokenizer=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(vocabulary=100), "--vocabulary 100: must be at least 261"),
        (Options(valid_fraction=1.0), "--valid-fraction 1.0: must be at least 0 and less than 1"),
        (Options(shard_tokens=0), "--shard-tokens 0: must be at least 1"),
        (Options(tokenizer_bytes=0), "--tokenizer-bytes 0: must be at least 1"),
        (Options(separator=""), "--document-separator: may not be empty"),
    ],
)
def test_bad_options_are_named(texts: Path, tmp_path: Path, options: Options, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare([str(texts)], str(tmp_path / "out"), options)


@pytest.mark.parametrize(("documents", "fraction", "held_out"), [(1, 0.5, 0), (5, 0.01, 0), (10, 0.01, 1), (40, 0, 0)])
def test_how_many_documents_are_held_out(tmp_path: Path, documents: int, fraction: float, held_out: int) -> None:
    rows = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(documents)) + json.dumps({"text": ""})
    (tmp_path / "a.jsonl").write_text(rows)
    out = tmp_path / "out"
    manifest = prepare([str(tmp_path / "a.jsonl")], str(out), Options(vocabulary=300, valid_fraction=fraction)).manifest
    assert (manifest.valid.documents, manifest.train.documents) == (held_out, documents - held_out)
    assert manifest.input.skipped_empty_documents == 1


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"word{chr(97 + i) * 9} " * 50)
    prepare([str(tmp_path)], str(tmp_path / "out"), Options(vocabulary=600, valid_fraction=0.2))
    corpus = Corpus(str(tmp_path / "out"))
    per_document = [int(n) / 50 for n in corpus.train.lengths], [int(n) / 50 for n in corpus.valid.lengths]
    assert len(per_document[1]) == 4
    assert max(per_document[0]) < min(per_document[1]), "unseen words cost more tokens"


def test_wide_vocabularies_use_four_bytes(texts: Path, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "Rower": 70000}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "wide.json"))
    options = Options(tokenizer=str(tmp_path / "wide.json"), valid_fraction=0)
    manifest = prepare([str(texts)], str(tmp_path / "out"), options).manifest
    assert (manifest.dtype, manifest.vocabulary) == ("uint32", 70001)
    documents = Corpus(str(tmp_path / "out"), verify=True).train
    for number, path in enumerate(sorted(texts.iterdir())):
        ids = documents.read(number, 0, int(documents.lengths[number])).tolist()
        assert ids.count(70000) == path.read_text().count("Rower")
        assert ids[-1] == 0
