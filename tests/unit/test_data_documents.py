"""What is read as a document, and what each unreadable file is told."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from trireme_trainer.data.documents import BLANK_LINE, Reading, find_files, read_documents
from trireme_trainer.data.errors import DataError


def read(path: Path, **options: str) -> list[str]:
    return list(read_documents(str(path), Reading(**options)))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_file_is_a_document_without_trailing_white_space(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.txt", "  one\n\ntwo \n\n")) == ["  one\n\ntwo"]
    assert read(put(tmp_path / "bom.txt", "\ufeffhello")) == ["hello"]
    assert read(put(tmp_path / "a.txt.gz", gzip.compress("grüße\n".encode()))) == ["grüße"]


def test_separators(tmp_path: Path) -> None:
    text = put(tmp_path / "a.txt", "one\nmore\n \n\n\ntwo\r\n\r\nthree\n")
    assert read(text, separator=BLANK_LINE) == ["one\nmore", "two", "three"]
    text = put(tmp_path / "b.txt", "one\n\nmore\n---\n---\ntwo --- x\n")
    assert read(text, separator="---") == ["one\n\nmore", "", "two --- x"]


def test_rows(tmp_path: Path) -> None:
    rows = [{"text": "one\n"}, {"text": ""}, {"text": "zwei €"}]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert read(put(tmp_path / "a.jsonl", text)) == ["one", "", "zwei €"]
    assert read(put(tmp_path / "a.jsonl.gz", gzip.compress(text.encode()))) == ["one", "", "zwei €"]
    assert read(put(tmp_path / "b.ndjson", '{"content": "x"}'), text_field="content") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a.txt: empty file; remove it or leave it out with --exclude"),
        ("a.txt", b" \n\t\n", r"a.txt: white space only; remove it"),
        ("a.jsonl", b"\n\n", r"a.jsonl: white space only"),
        ("a.jsonl", b'{"text": " "}\n', r"a.jsonl: white space only"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), r"a.txt.gz: empty file"),
        ("a.txt", b"good\xff\xfebad", r"a.txt: byte 0xff at offset 4 is not UTF-8 text; convert it to UTF-8 \(iconv"),
        ("a.txt", b"cut" + "€".encode()[:2], r"a.txt: byte 0xe2 at offset 3 is not UTF-8 text"),
        ("a.txt", "text".encode("utf-16-le"), r"a.txt: byte 0x00 at offset 1: binary or UTF-16, not UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"ab\x80", mtime=0), r"a.txt.gz: byte 0x80 at offset 2 is not UTF-8"),
        ("a.txt.gz", b"not gzip at all", r"a.txt.gz: damaged gzip file"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-9], r"a.txt.gz: damaged gzip file"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', r"a.jsonl: byte 0xe9 at offset 28 is not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a.jsonl: line 2 \(byte 15\): not JSON"),
        ("a.jsonl", b'{"body": "ok"}\n', r"a.jsonl: line 1 \(byte 0\): no text in field 'text'; name the right one"),
        ("a.jsonl", b'{"text": 3}\n', r"no text in field 'text'"),
        ("a.jsonl", b'["text"]\n', r"no text in field 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"half of a surrogate pair"),
    ],
)
def test_unreadable_files_are_named_with_place_and_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_undecodable_line_is_placed_when_cut_at_separators(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"byte 0xff at offset 8"):
        read(put(tmp_path / "a.txt", b"one\n\ntwo\xff\n"), separator=BLANK_LINE)


def test_files_come_in_the_order_of_their_names_each_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.md", "Z.txt", ".hidden", ".git/x", "out/old.txt"):
        put(tmp_path / name, "x")
    os.symlink(tmp_path / "b.txt", tmp_path / "link.txt")

    def names(found: list[str]) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in found]

    top, out = str(tmp_path), str(tmp_path / "out")
    assert names(find_files([top], output=out)) == ["Z.txt", "a/c.md", "a/z.txt", "b.txt"]
    assert names(find_files([top], include=["*.txt"], exclude=["a/*"], output=out)) == ["Z.txt", "b.txt"]
    assert names(find_files([str(tmp_path / "b.txt"), top], output=out))[0] == "b.txt"


def test_input_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such file or directory"):
        find_files([str(tmp_path / "absent")])
    with pytest.raises(DataError, match="no files to read in this directory"):
        find_files([str(tmp_path)])
    os.symlink(tmp_path / "nothing", tmp_path / "dangling")
    with pytest.raises(DataError, match="dangling: not a regular file, or a link to nothing"):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match="no input"):
        find_files([])
