"""`trireme run` with the real trainer: a killed rank, Ctrl-C and going on, a killed agent, warm start, bad recipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from gang import make_corpus, make_recipe
from trireme_agent import processes

STEPS = 40
EVERY = 10
TRIREME = [sys.executable, "-m", "trireme_cli.main"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local-run")
    make_corpus(folder)
    path = folder / "recipe.yaml"
    # A relative data path, resolved by --data-root.
    path.write_text(yaml.safe_dump(make_recipe(Path("corpus"), steps=STEPS)))
    return path


def start(recipe: Path, directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        *TRIREME, "run", str(recipe), "--nproc", "2", "--every", str(EVERY), "--data-root", str(recipe.parent),
        "--dir", str(directory), "--json", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=240)
    assert out, err
    result: dict[str, Any] = json.loads(out)
    assert result["exit"] == process.returncode, err
    return {**result, "stderr": err}


def losses(directory: Path) -> dict[int, float]:
    """By step; of a step done more than once, the newest attempt's."""
    found: dict[int, tuple[int, float]] = {}
    for row in _rows(directory):
        if "loss" in row and row["attempt"] >= found.get(row["step"], (0, 0.0))[0]:
            found[row["step"]] = row["attempt"], row["loss"]
    return {step: loss for step, (_, loss) in found.items()}


def _rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / "checkpoints" / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # a line being written
    return rows


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank → pid, of the processes below this `trireme run` that are ranks."""
    found = {}
    for pid in processes.descendants(process.pid):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        values = dict(variable.partition(b"=")[::2] for variable in variables)
        stat = processes.read_stat(pid)
        if b"RANK" in values and stat is not None and stat.session == pid:
            found[int(values[b"RANK"])] = pid
    return found


def alive(pid: int) -> bool:
    stat = processes.read_stat(pid)
    return stat is not None and stat.state != "Z"


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    result = finish(start(recipe, directory))
    assert result["exit"] == 0, result["stderr"]
    assert result["progress"]["step"] == STEPS
    found = losses(directory)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [(), ("--warm",)], ids=["cold", "warm"])
def test_a_killed_rank_comes_back_and_the_loss_continues_exactly(
    recipe: Path, tmp_path: Path, uninterrupted: dict[int, float], options: tuple[str, ...]
) -> None:
    process = start(recipe, tmp_path, *options)
    committed = tmp_path / "checkpoints" / f"step-{EVERY:08d}"
    wait_until(lambda: committed.exists() and max(losses(tmp_path), default=0) >= EVERY + 5, process)
    killed = time.time()
    os.kill(ranks(process)[1], signal.SIGKILL)
    result = finish(process)
    assert result["exit"] == 0, result["stderr"]
    assert (result["restarts"], result["attempt"]) == (1, 2)
    failure = result["failures"][0]
    assert (failure["rank"], failure["exit"], failure["cascade"]) == (1, -9, False)
    assert failure["at"] - killed < 2.0
    again = next(row for row in _rows(tmp_path) if row["attempt"] == 2 and "loss" in row)
    assert again["step"] > EVERY, "it began at a checkpoint, not anew"
    assert losses(tmp_path) == pytest.approx(uninterrupted, rel=0, abs=1e-6)
    at = {"seen": failure["at"], **result["phases"]}
    order = ["seen", "stopped", "assigned", "started", "rendezvous", "loaded", "firstStep"]
    seconds = [f"{name} {at[name] - killed:.2f}" for name in order]
    assert at["started"] - killed < 5.0, "the ranks are started again without delay, whatever their imports take"
    print(f"\nseconds after kill -9, {' '.join(options) or 'cold'} start: {', '.join(seconds)}")


@pytest.mark.timeout(600)
def test_ctrl_c_saves_and_stops_and_the_same_command_goes_on(
    recipe: Path, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    process = start(recipe, tmp_path)
    wait_until(lambda: max(losses(tmp_path), default=0) >= 3, process)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result["exit"] == 75, result["stderr"]
    step = result["checkpoint"]["step"]
    assert step == max(losses(tmp_path))
    assert step < STEPS
    result = finish(start(recipe, tmp_path))
    assert result["exit"] == 0, result["stderr"]
    assert result["attempt"] == 2, "attempts of a directory only rise"
    assert losses(tmp_path) == pytest.approx(uninterrupted, rel=0, abs=1e-6)


@pytest.mark.timeout(300)
def test_nothing_survives_a_killed_agent(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path)
    wait_until(lambda: max(losses(tmp_path), default=0) >= 1, process)
    pids = ranks(process)
    agent = processes.children(process.pid)[0].pid
    os.kill(agent, signal.SIGKILL)
    result = finish(process)
    assert result["exit"] == 137
    assert "killed by signal 9" in result["message"]
    assert not any(alive(pid) for pid in pids.values())


@pytest.mark.timeout(300)
def test_a_killed_trireme_run_takes_its_ranks_along(recipe: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path, "--grace", "5")
    wait_until(lambda: max(losses(tmp_path), default=0) >= 1, process)
    pids = ranks(process)
    assert sorted(pids) == [0, 1]
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(alive(pid) for pid in pids.values()):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_bad_data_ends_the_run_at_once_with_its_own_code(recipe: Path, tmp_path: Path) -> None:
    """What no manifest tells: a shard is gone."""
    shutil.copytree(recipe.parent / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "train-00000.tokens").unlink()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.read_text())
    result = finish(start(path, tmp_path / "run"))
    assert result["exit"] == 65, result["stderr"]
    assert result["restarts"] == 0
    assert "train-00000.tokens: missing" in result["failures"][0]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learningRate": 1}, "learningRate: unknown field"),
        ({"until": {}}, "until: give either tokens or steps"),
        ({"data": {"sources": [{"path": "pvc://corpus/en"}], "sequenceLength": 32}}, "--pvc corpus=DIR"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_field(
    recipe: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **change}))
    process = start(path, tmp_path / "run")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (64, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists(), "nothing is left half-made"
