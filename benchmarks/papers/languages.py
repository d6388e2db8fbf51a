"""Real text in eight languages, of which there is very unequally much: Debian's translated manual pages.

Of German and French the first 150 pages, of Macedonian 24 short ones, as apt-get has them; nothing is installed. roff
is taken off by a few rules, enough for prose: a line is a paragraph.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo.corpus import download

LANGUAGES = ("de", "fr", "ru", "es", "nl", "fi", "ro", "mk")
"""From most text to least."""
PAGES = 150
"""Most pages of a language: more would not be seen in runs of minutes."""
SHORTEST = 200
"""Characters of a page worth having; shorter ones point to another page."""
_ESCAPES = (
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[+-]?\d+"), ""),
    (re.compile(r"\\\[u([0-9A-F]{4,5})\]"), lambda found: chr(int(found[1], 16))),
    (re.compile(r"\\\*?(\[[^]]*\]|\([a-zA-Z]q)"), "'"),
    (re.compile(r"\\\*?(\(..)"), ""),
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\[e\\]"), "/"),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\."), ""),
)
_FONT = re.compile(r"\.\s*(B|I|BR|BI|RB|RI|IR|IB|SM|SB)\s+(.*)")
_HEADING = re.compile(r"\.\s*(SH|SS)\s+(.*)")


def plain(roff: str) -> str:
    """The page's paragraphs, one a line."""
    paragraphs: list[list[str]] = [[]]
    for line in roff.split("\n"):
        if line.startswith((".\\\"", "'\\\"")):
            continue
        heading, font = _HEADING.match(line), _FONT.match(line)
        if heading:
            paragraphs += [[_clean(heading[2])], []]
        elif font:
            paragraphs[-1].append(_clean(font[2]))
        elif line.startswith((".", "'")) or not line.strip():
            paragraphs.append([])
        else:
            paragraphs[-1].append(_clean(line))
    lines = (" ".join(" ".join(part).split()) for part in paragraphs)
    return "\n".join(line for line in lines if line)


def _clean(line: str) -> str:
    for pattern, instead in _ESCAPES:
        line = pattern.sub(instead, line)
    return line.replace('"', "")


def pages(tree: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each manual page of an unpacked package."""
    for path in sorted(tree.rglob("usr/share/man/*/man*/*.gz")):
        if path.is_file() and not path.is_symlink():
            text = plain(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
            if len(text) >= SHORTEST:
                yield path.name.removesuffix(".gz"), text


def fetch(folder: Path) -> list[str]:
    """Writes one directory of .txt files per language below `folder`/texts, once. Returns the packages' names with
    their versions."""
    texts, archives = folder / "texts", folder / "packages"
    if not (texts / ".complete").exists():
        archives.mkdir(parents=True, exist_ok=True)
        download(archives, [f"manpages-{language}" for language in LANGUAGES])
        for archive in sorted(archives.glob("*.deb")):
            tree = archives / archive.stem
            subprocess.run(["dpkg-deb", "--extract", str(archive), str(tree)], check=True)
            language = archive.name.partition("_")[0].removeprefix("manpages-")
            (texts / language).mkdir(parents=True, exist_ok=True)
            for name, text in islice(pages(tree), PAGES):
                (texts / language / f"{name}.txt").write_text(text, encoding="utf-8")
        (texts / ".complete").touch()
    return sorted(archive.stem for archive in archives.glob("*.deb"))


def make_corpora(folder: Path, vocabulary: int) -> tuple[dict[str, Path], list[str]]:
    """Shards by language, all with one SentencePiece model that was trained on at most 25 pages of each; and the
    packages the text is from. Made once, then found again."""
    from trireme_trainer.data.prepare import Options, prepare

    packages = fetch(folder)
    some = [str(path) for name in LANGUAGES for path in sorted((folder / "texts" / name).glob("*.txt"))[:25]]
    options = Options(vocabulary=vocabulary, train_tokenizer="sentencepiece", valid_fraction=0.0)
    every = prepare(some, str(folder / f"all-{vocabulary}"), options)
    model = str(Path(every.directory) / every.manifest.tokenizer.file)
    found = {}
    for name in LANGUAGES:
        output = folder / f"{name}-{vocabulary}"
        prepare(
            [str(folder / "texts" / name)], str(output), Options(tokenizer=model, language=name, valid_fraction=0.15)
        )
        found[name] = output
    return found, packages
