"""What the miniatures of the papers share: the command line, runs that are kept as each finishes and are not made
again, and at the end their table and plot.

A paper's run.py says as a `Miniature` what it measures, and hands it to `main`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import languages
import matplotlib
import processes
import text
import torch
from matplotlib.figure import Figure

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "trireme"  # the same plot is the same file

Options = argparse.Namespace
Run = dict[str, Any]
Runs = dict[str, Run]
Corpus = TypeVar("Corpus")
TUNING = 0
"""The seed on which learning rates are chosen; it is not measured."""


@dataclass(frozen=True)
class Miniature(Generic[Corpus]):
    file: str
    """Its run.py; results are kept beside it."""
    about: str | None
    settings: dict[str, Any]
    """Options of the command line and their values; `seeds` is one."""
    quick: dict[str, Any]
    """What --quick sets instead."""
    shape: Callable[[Options], dict[str, Any]]
    """What all runs in one result file have in common."""
    corpus: Callable[[Path], tuple[Corpus, Any]]
    """Makes below a directory what runs read; and what that is, in words."""
    plan: Callable[[Options, Runs], Iterator[tuple[str, Callable[[Corpus], Run]]]]
    """Names of the runs in their order, and how each is made; a later one may depend on what earlier ones found."""
    table: Callable[[Options, Runs], list[str]]
    plot: Callable[[Options, Runs], Figure]


def main(paper: Miniature[Any]) -> None:
    options = _options(paper)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": processes.machine(), "shape": paper.shape(options), "runs": {}}
    if options.output.exists() and not options.quick:
        result = _kept(options.output, result["shape"])
    runs, measured, corpus = result["runs"], 0, None
    with tempfile.TemporaryDirectory(prefix="miniature-") as directory:
        for name, run in paper.plan(options, runs):
            if name in runs:
                continue
            if not measured:
                corpus, words = paper.corpus(options.work or Path(directory))
                if result.setdefault("text", words) != words:
                    sys.exit(f"{options.output} holds runs on {result['text']}, here is {words}: name another --output")
            began = time.perf_counter()
            runs[name] = {**run(corpus), "seconds": round(time.perf_counter() - began, 1)}
            measured += 1
            if not options.quick:
                options.output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {_in_short(runs[name])}", flush=True)
    print("\n".join(paper.table(options, runs)))
    picture = options.output.with_suffix(".svg")
    if not options.quick and (measured or not picture.exists()):
        paper.plot(options, runs).savefig(picture, metadata={"Date": None})
    print(f"{measured} runs measured now, {len(runs) - measured} before")


def _options(paper: Miniature[Any]) -> Options:
    parser = argparse.ArgumentParser(description=paper.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in paper.settings.items():
        several = isinstance(value, list)
        kind = type(value[0] if several else value)
        default = " ".join(map(str, value)) if several else value
        parser.add_argument(
            f"--{name}", type=kind, nargs="+" if several else None, default=value, help=f"left out: {default}",
            choices=value if several and kind is str else None, metavar=kind.__name__.upper(),
        )  # fmt: skip
    quick = ", ".join(f"{name} {value}" for name, value in paper.quick.items())
    parser.add_argument("--quick", action="store_true", help=f"does it run? {quick}; prints, keeps nothing")
    parser.add_argument("--work", type=Path, help="where the tokenised text is kept; left out: made anew")
    parser.add_argument("--output", type=Path, default=Path(paper.file).resolve().parent / "result.json")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(paper.quick)
    return options


def _kept(output: Path, shape: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(output.read_text())
    if kept["shape"] != shape:
        sys.exit(f"{output} holds runs of {kept['shape']}, not of {shape}: name another --output, or delete it")
    return kept


def _in_short(run: Run) -> str:
    return ", ".join(f"{what} {value}" for what, value in run.items() if not isinstance(value, list | dict))


def english(vocabulary: int) -> Callable[[Path], tuple[Path, str]]:
    return lambda directory: (text.make_corpus(directory, vocabulary), text.name())


def eight_languages(vocabulary: int) -> Callable[[Path], tuple[dict[str, Path], list[str]]]:
    return lambda directory: languages.make_corpora(directory, vocabulary)


def seeds(options: Options) -> list[int]:
    """Those that are measured."""
    return list(range(1, options.seeds + 1))


def best(rates: Sequence[float], loss: Callable[[float], float | None]) -> float:
    """The rate of the lowest loss; None is a run that diverged."""

    def at(rate: float) -> float:
        found = loss(rate)
        return math.inf if found is None else found

    return min(rates, key=at)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean (lowest to highest)."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
