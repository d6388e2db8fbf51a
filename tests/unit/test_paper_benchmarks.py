"""The text that the miniatures of the papers train on."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "papers"))
import text


def test_the_text_is_prose_and_the_same_each_time() -> None:
    first, again = (list(islice(text.documents(), 90)) for _ in range(2))
    assert first == again
    assert sum(len(document) for document in first) > 300_000
    assert sum(document.count(" the ") for document in first) > 2_000


def test_docstrings_of_a_module() -> None:
    source = '"""Of the module."""\nclass A:\n    """Of a class."""\n    def f(self):\n        """Of a method."""\n'
    assert text.docstrings(source) == ["Of the module.", "Of a class.", "Of a method."]
    assert text.docstrings("x = (") == []
