"""The logbook page: step logs that were cut, resumed and thinned; what the page tells; that it fetches nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from operator_cases import NOW, failure, heard
from test_cli_jobs import running
from trireme_api.protocol import AgentState, Cause
from trireme_cli import sessions
from trireme_cli.main import cli
from trireme_cli.notes import Note, annotation
from trireme_cli.report import thin
from trireme_cli.report.charts import Figure, Line, Mark, figure, ticks
from trireme_cli.report.page import page
from trireme_cli.report.sources import read_directory
from trireme_cli.report.steplog import StepLog, seconds_by_state
from trireme_cli.report.story import Story, of_job

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'


def rows(attempt: int, first: int, last: int, begin: float, loss: float = 5.0) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "attempt": attempt, "time": begin + step - first, "loss": loss - step / 100,
            "tokens": step * 10, "tokensPerSecond": 10.0, "tflops": 0.5,
        }
        for step in range(first, last + 1)
    ]  # fmt: skip


def text(entries: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(entry) for entry in entries]


LOG = [
    {"event": "environment", "device": "cpu", "ranks": 2, "torch": "2.13", "attempt": 1, "time": NOW},
    *rows(1, 1, 20, NOW),
    {"event": "started", "imported": 1.0, "first_step": 2.0, "peakMemoryBytes": 2**30, "attempt": 1, "time": NOW + 1},
    {"event": "checkpoint", "step": 10, "path": "/c/10", "attempt": 1, "time": NOW + 10},
    *rows(2, 11, 40, NOW + 100),
    {"event": "rolled-back", "step": 30, "reason": "spike", "attempt": 2, "time": NOW + 130},
    *rows(2, 31, 50, NOW + 140),
    {"event": "ended", "step": 50, "seconds": {"step": 45.0, "init": 3.0}, "attempt": 2, "time": NOW + 160},
]


def test_the_newest_row_of_a_step_counts_also_after_a_rollback_in_one_attempt() -> None:
    log = StepLog.parse([*text(LOG), '{"step": 51, "att'])
    effective = [(row.step, row.attempt) for row in log.effective]
    assert effective == [(s, 1) for s in range(1, 11)] + [(s, 2) for s in range(11, 51)]
    assert [row.time for row in log.effective][30] == NOW + 140, "step 31 as it was done after the rollback"
    assert sum(not counts for counts in log.counts) == 10 + 10
    assert seconds_by_state(log, 1) == {"init": 1.0, "compile": 2.0, "step": 19.0}
    assert seconds_by_state(log, 2) == {"step": 45.0, "init": 3.0}


def test_thinning_keeps_events_ends_and_every_spike() -> None:
    chance = random.Random(1)
    peaks = sorted(chance.sample(range(2, 20_000), 5))
    entries = rows(1, 1, 20_000, NOW)
    for entry in entries:
        entry["loss"] = 99.0 if entry["step"] in peaks else 1.0 + chance.random()
    entries.insert(7000, {"event": "rolled-back", "attempt": 1, "time": NOW})
    kept = [json.loads(line) for line in thin.thin(text(entries), 300)]
    steps = [entry["step"] for entry in kept if "step" in entry]
    assert len(steps) < 700
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert steps == sorted(steps)
    assert set(peaks) <= set(steps)
    assert sum("event" in entry for entry in kept) == 1
    assert [row.step for row in StepLog.parse(text(kept)).effective] == steps, "nothing counts less for being thinned"


def test_what_thins_runs_alone_as_it_does_in_a_pod(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(text(LOG)))
    for part, name in enumerate(("metrics.attempt-2.part-000010", "metrics.attempt-2.part-000009")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"event": "x", "attempt": part, "time": 0}) + "\n")
    command = [sys.executable, "-I", "-c", Path(thin.__file__).read_text(), str(tmp_path), "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    log = StepLog.parse(done.stdout.splitlines())
    assert log == read_directory(str(tmp_path))
    assert [event.attempt for event in log.named("x")] == [1, 0], "parts in the order in which they were written"
    nothing = subprocess.run([*command[:-2], str(tmp_path / "no"), "9"], capture_output=True, text=True, check=False)
    assert nothing.returncode == 1
    assert "no step log in" in nothing.stderr


class Reader(HTMLParser):
    """Finds what a page must not have, and what it has."""

    VOID = frozenset({"meta", "br", "line", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "action", "data", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == [], "every element is closed"
    assert not reader.tags & {"script", "img", "link", "iframe", "object", "embed", "form"}
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links), reader.links
    assert "url(" not in html
    assert "@import" not in html
    assert len(reader.ids) == len(set(reader.ids))
    return reader


def story() -> Story:
    scene = running(carbonPolicy={"zone": "SE"})
    broke = failure(Cause.NETWORK, message=f"peer closed {EVIL}", rank=1, exit=1)
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=broke)
    scene.settle()
    scene.obj["status"]["energy"] = {"joules": 7.2e6, "source": "nvml", "idleJoules": 12.0}
    scene.obj["status"]["energy"]["attempts"] = [{"attempt": 1, "joules": {"gpu": 7e6, "cpu": 2e5}, "grams": 89.5}]
    scene.obj["status"]["carbon"] = {"grams": 89.5, "gramsPerKilowattHour": 40.7, "pue": 1.1, "source": "a table"}
    scene.obj["status"]["carbon"]["embodiedByMode"] = {"calendar": {"low": 1.0, "mid": 2.0, "high": 3.0}}
    notes = [Note(NOW + 5, "me", f"halved the rate {EVIL}")]
    pods = [{"metadata": {"name": "job-0-1"}, "spec": {"nodeName": "n0", "containers": []}}]
    old = {"reason": "Admitted", "message": "in an event alone", "lastTimestamp": "2027-01-15T08:00:00Z"}
    return of_job(scene.obj, [old], pods, notes, StepLog.parse(text(LOG)), "", scene.now)


def test_the_page_has_every_part_and_fetches_and_runs_nothing() -> None:
    reader = read(page(story()))
    assert reader.ids == [
        "logbook", "loss", "throughput", "time", "memory", "energy", "failures", "configuration", "environment",
    ]  # fmt: skip
    for part in (
        "Recovering (RestartProcess)", "network: peer closed", "note by me", "halved the rate", "in an event alone",
        "From 4.99 at step 1 to 4.5 at step 50", "attempt 2", "2 kWh", "source nvml", "89.5g", "OPT-175B", "1/837,989",
        "BLOOM", "2g CO2e (1g to 3g)", "7,200,000 J, 89.5g CO2e", "12 J while no rank ran",
        "1.0 GiB", "network", "RestartProcess 2", "desired: 2", "job-0-1", "torch", "rolled back",
    ):  # fmt: skip
        assert part in reader.words, part


def test_what_is_not_known_is_said_and_not_invented() -> None:
    scene = running()
    bare = of_job(scene.obj, [], [], [], None, "The step log lies elsewhere.", scene.now)
    words = read(page(bare)).words
    for part in ("The step log lies elsewhere.", "No energy was measured or declared", "No attempt told its peak"):
        assert part in words
    assert "1/" not in words.split("Beside known runs")[1].split("Failures")[0]


def test_attempts_follow_one_another_on_the_clock() -> None:
    bars = story().bars
    assert [bar.attempt for bar in bars] == ["1", "2"]
    assert bars[1].begin == pytest.approx(bars[0].begin + bars[0].length)


def test_a_figure_marks_restarts_and_says_what_it_shows() -> None:
    lines, marks = [Line("a", [(1, 2.0), None, (3, 1.0)])], [Mark(2, "attempt 2", EVIL)]
    html = figure(Figure("Loss", "step", "loss", lines, marks, summary="S"))
    assert 'aria-label="Loss. S"' in html
    assert html.count("M") == 2, "a gap lifts the pen"
    assert "attempt 2" in html
    assert "<script>" not in html
    assert "no figures yet" in figure(Figure("Loss", "step", "loss", [Line("a", [])]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.37, 1.38), (0, 0), (-5, 1e9), (99.0, 99.0), (1e-9, 2e-9)])
def test_ticks_are_few_and_enclose_the_values(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 8
    assert found[0] <= low <= high <= found[-1]


def test_a_local_run_is_told_from_what_it_left(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "metrics.jsonl").write_text("\n".join(text(LOG)))
    plan = {"name": "mine", "nproc": 2, "checkpoint": str(checkpoints), "recipe": {"model": {"preset": "opt-125m"}}}
    sessions.begin(tmp_path, 1, plan)
    broke = {"attempt": 1, "step": 20, "cause": "unknown", "message": EVIL, "at": NOW + 50}
    energy = {"cpu": {"joules": 3600.0, "source": "declared"}, "gpu": {"joules": None, "source": "missing"}}
    result = {"restarts": 1, "failures": [broke], "energy": energy, "message": "done", "progress": {"totalSteps": 50}}
    sessions.end(tmp_path, 1, result)
    target = tmp_path / "page.html"
    arguments = ["report", "--local", str(tmp_path), "--grams-per-kwh", "100", "--pue", "1", "-o", str(target)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    words = read(target.read_text()).words
    for part in ("mine", "50 of 50", "restarted", "1 Wh", "0.1g", "opt-125m", f"step 20: {EVIL}"):
        assert part in words, part
    assert sessions.why({**broke, "cause": "network"}) == f"network: {EVIL}"
    told = json.loads(CliRunner().invoke(cli, [*arguments[:3], "--json"]).output)
    assert told["bars"][0]["seconds"]["lost"] == pytest.approx(19.0 * 10 / 20)
    assert told["energy"]["grams"] is None, "no zone, no carbon"


def test_notes_of_the_object_come_onto_its_page() -> None:
    key, value = annotation(Note(NOW, "me", "noted"))
    assert key.startswith("note.trireme.dev/")
    assert json.loads(value)["text"] == "noted"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report"], "give either"),
        (["report", "a", "--local", "b"], "give either"),
        (["report", "a", "--zone", "SE"], "--zone is of --local; of a TrainingJob, spec.carbonPolicy says it"),
        (["report", "a", "--grams-per-kwh", "1"], "--grams-per-kwh is of --local"),
        (["report", "a", "--pue", "1.1"], "--pue is of --local"),
        (["report", "--local", "b", "--steps", "c"], "--steps is of a TrainingJob"),
        (["report", "--local", "nowhere"], "no sessions of `trireme run`"),
        (["report", "--local", "nowhere", "--zone", "XX"], "XX"),
    ],
)
def test_bad_arguments_are_said_in_one_line(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code != 0
    assert says in done.output + str(done.exception)
