"""Real text that every Python carries with it: the language reference's topics and the standard library's docstrings.

About 4 MB of English prose with some code, the same for one Python version everywhere, and nothing to download.
"""

from __future__ import annotations

import ast
import importlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def documents() -> Iterator[str]:
    """Topics in alphabetical order, then one document of docstrings per module."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not LEFT_OUT.intersection(path.relative_to(library).parts):
            strings = docstrings(path.read_text(encoding="utf-8", errors="replace"))
            if strings:
                yield "\n".join(strings)


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
        return [text for text in found if text]
    except SyntaxError:
        return []


def make_corpus(directory: Path, vocabulary: int, valid_fraction: float = 0.05) -> Path:
    """Shards of it below `directory`, tokenised with a byte-level BPE of its own; made once, then found again."""
    from trireme_trainer.data.prepare import Options, prepare

    output = directory / f"corpus-{vocabulary}"
    folder = directory / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents()):
        (folder / f"{number:05d}.txt").write_text(document, encoding="utf-8")
    options = Options(vocabulary=vocabulary, valid_fraction=valid_fraction)
    prepare([str(folder)], str(output), options)
    return output


def name() -> str:
    return f"documentation of Python {platform.python_version()}"
