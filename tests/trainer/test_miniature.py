"""The runner of the papers' miniatures: what is measured is kept, once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "papers"))
from miniature import TUNING, Miniature, Options, Run, Runs, best, main, seeds


class Counted:
    """A paper whose loss is the distance of its rate from 3."""

    def __init__(self, folder: Path, text: str = "a text") -> None:
        self.made: list[tuple[float, int]] = []
        self.paper = Miniature(
            str(folder / "run.py"), "About.", settings={"rates": [1.0, 3.0, 5.0], "seeds": 2}, quick={"seeds": 1},
            shape=lambda options: {"rates": options.rates}, corpus=lambda directory: (7, text),
            plan=self.plan, table=lambda options, runs: [f"{len(runs)} in the table"], plot=self.plot,
        )  # fmt: skip

    def plan(self, options: Options, runs: Runs) -> Iterator[tuple[str, Callable[[int], Run]]]:
        for rate in options.rates:
            yield f"{rate} {TUNING}", partial(self.run, rate, TUNING)
        rate = best(options.rates, lambda rate: runs[f"{rate} {TUNING}"]["loss"])
        for seed in seeds(options):
            yield f"{rate} {seed}", partial(self.run, rate, seed)

    def run(self, rate: float, seed: int, corpus: int) -> Run:
        assert corpus == 7
        self.made.append((rate, seed))
        return {"loss": abs(rate - 3) if rate < 5 else None}

    def plot(self, options: Options, runs: Runs) -> Any:
        import matplotlib.pyplot as plt

        return plt.figure()


def call(monkeypatch: pytest.MonkeyPatch, counted: Counted, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    main(counted.paper)


def test_the_best_rate_of_a_seed_that_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tmp_path)
    call(monkeypatch, counted)
    assert counted.made == [(1.0, 0), (3.0, 0), (5.0, 0), (3.0, 1), (3.0, 2)]


def test_what_is_kept_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, Counted(tmp_path))
    path, picture = tmp_path / "result.json", tmp_path / "result.svg"
    result = json.loads(path.read_text())
    del result["runs"]["3.0 2"]
    path.write_text(json.dumps(result))
    again = Counted(tmp_path)
    call(monkeypatch, again)
    assert again.made == [(3.0, 2)]
    before = path.read_bytes(), picture.read_bytes()
    last = Counted(tmp_path, "another text, which nobody asks for")
    call(monkeypatch, last)
    assert last.made == []
    assert (path.read_bytes(), picture.read_bytes()) == before
    assert "0 runs measured now, 5 before" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "arguments"), [("a text", ["--rates", "1", "2"]), ("another", ["--seeds", "3"])])
def test_runs_of_another_kind_are_not_mixed_and_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, arguments: list[str]
) -> None:
    call(monkeypatch, Counted(tmp_path))
    before = (tmp_path / "result.json").read_bytes()
    other = Counted(tmp_path, text)
    with pytest.raises(SystemExit, match=r"result\.json holds runs .*name another --output"):
        call(monkeypatch, other, *arguments)
    assert other.made == []
    assert (tmp_path / "result.json").read_bytes() == before


def test_quick_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tmp_path)
    call(monkeypatch, counted, "--quick")
    assert counted.made[-1] == (3.0, 1)
    assert list(tmp_path.iterdir()) == []
