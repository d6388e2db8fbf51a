"""The text that the miniatures of the papers train on."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path

PAPERS = Path(__file__).resolve().parents[2] / "benchmarks" / "papers"
sys.path.insert(0, str(PAPERS))
import languages  # noqa: E402
import text  # noqa: E402


def test_the_text_is_prose_and_the_same_each_time() -> None:
    first, again = (list(islice(text.documents(), 90)) for _ in range(2))
    assert first == again
    assert sum(len(document) for document in first) > 300_000
    assert sum(document.count(" the ") for document in first) > 2_000


def test_docstrings_of_a_module() -> None:
    source = '"""Of the module."""\nclass A:\n    """Of a class."""\n    def f(self):\n        """Of a method."""\n'
    assert text.docstrings(source) == ["Of the module.", "Of a class.", "Of a method."]
    assert text.docstrings("x = (") == []


def test_the_page_of_papers_links_miniatures_that_can_be_run() -> None:
    linked = re.findall(r"\]\(([a-z]+)/README\.md\)", (PAPERS / "README.md").read_text())
    assert len(linked) >= 4
    for name in linked:
        assert (PAPERS / name / "README.md").is_file(), name
        assert (PAPERS / name / "run.py").is_file(), name


def test_prose_of_a_manual_page() -> None:
    roff = (
        '.\\" -*- coding: UTF-8 -*-\n.TH LS 1 "2022"\n.SH "NAME ÄÖ"\nls \\- Verzeichnisinhalte auf\\(hy\nlisten\n.PP\n'
        '.B ls\n[\\fIOPTION\\/\\fP]\\&… \\(aqx\\(aq\n.TP\n'
        '\\fB\\-a\\fP, \\fB\\-\\-all\\fP\nGr\\[u00F6]ße\n.BR chmod (1)\n'
    )
    assert languages.plain(roff).split("\n") == [
        "NAME ÄÖ", "ls - Verzeichnisinhalte auf listen", "ls [OPTION]… 'x'", "-a, --all Größe chmod (1)"]  # fmt: skip
