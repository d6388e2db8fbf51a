"""Learning from a stream inside one run: sessions that end and go on, growth between them, data not there yet."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from gang import SEQUENCE, Gang, make_recipe
from test_grow import MODEL, whole_state
from trireme_api.protocol import ExitCode
from trireme_trainer.data.prepare import Options, prepare

WAITS = ExitCode.SAVED_AND_STOPPED
STEPS = 12
BATCHES = 3


def recipe(
    stream: Path, batches: int = BATCHES, steps: int = STEPS, model: dict[str, Any] = MODEL, **anytime: Any
) -> dict[str, Any]:
    spec = make_recipe(stream / "mega-{n}", steps=steps, model=model)
    return {**spec, "anytime": {"megaBatches": batches, **anytime}}


def sessions(root: Path, spec: dict[str, Any], worlds: list[int]) -> dict[int, float]:
    """Losses by step of a run with one attempt per session."""
    found: dict[int, float] = {}
    for number, world in enumerate(worlds, start=1):
        last = number == len(worlds)
        gang = Gang(root, spec, world=world, attempt=number, every=100).run(expect=0 if last else int(WAITS))
        found |= gang.losses()
    return found


GROWING = {"growEvery": 1, "replay": 0.25}


def disturbed(root: Path, spec: dict[str, Any], keep: int = 3) -> tuple[dict[int, float], Gang]:
    """Losses of a run of three sessions with growth, and its last attempt. On 2 ranks; on 3, lost after growth before
    it saved anything, so that the next grows the same way; on 1; on 2, stopped within a session; on 3."""
    losses = Gang(root, spec, world=2, attempt=1, every=100).run(expect=int(WAITS)).losses()
    lost = Gang(root, spec, world=3, attempt=2, every=100, fault="slow").start().until_step(5)
    lost.signal(signal.SIGKILL)
    lost.wait()
    assert len(lost.events("grown")) == 1
    again = Gang(root, spec, world=1, attempt=3, every=2).run(expect=int(WAITS))
    assert sorted(again.losses()) == [5, 6, 7, 8]
    stopped = Gang(root, spec, world=2, attempt=4, every=1, keep=keep, fault="slow").start().until_step(10)
    stopped.signal(signal.SIGTERM)
    assert set(stopped.wait()) == {int(WAITS)}
    last = Gang(root, spec, world=3, attempt=5, every=100, keep=keep).run()
    assert last.events("grown") == []
    return losses | again.losses() | stopped.losses() | last.losses(), last


@pytest.fixture(scope="module")
def alone(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    root = tmp_path_factory.mktemp("alone")
    return root, sessions(root, recipe(stream, **GROWING), [1, 1, 1])


def test_grows_between_sessions(alone: tuple[Path, dict[int, float]]) -> None:
    root, losses = alone
    assert sorted(losses) == list(range(1, STEPS + 1))
    config, flat, meta = whole_state(root / "checkpoints")
    assert config.growths == 2
    assert config.parameters().total == sum(t.numel() for name, t in flat.items() if name.startswith("model."))
    assert meta["anytime"]["megaBatches"] == BATCHES
    rows = meta["anytime"]["sessions"]
    assert [(row["megaBatches"], row["step"], row["growths"]) for row in rows] == [(1, 4, 0), (2, 8, 1), (3, 12, 2)]
    assert rows[0]["parameters"] < rows[1]["parameters"] < rows[2]["parameters"] == config.parameters().total
    gang = Gang(root, {}, attempt=3)
    grown, ended = gang.events("grown"), gang.events("session-ended")
    assert [len(event["split"]) for event in grown] == [2]
    assert grown[0]["difference"] <= 1e-5
    assert all(abs(sum(layer) - 1) < 1e-5 for layer in grown[0]["usage"])
    assert ended[0]["cumulative"]["parameters"] == sum(row["parameters"] for row in rows)
    assert ended[0]["cumulative"]["flops"] == pytest.approx(sum(row["flops"] for row in rows))


def test_the_same_losses_at_any_number_of_ranks_with_a_crash_after_growth(
    stream: Path, alone: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    spec = recipe(stream, **GROWING)
    losses, _ = disturbed(tmp_path, spec)
    expected = alone[1]
    assert max(abs(losses[step] - expected[step]) for step in expected) <= 1e-5
    ours, theirs = (whole_state(root / "checkpoints") for root in (tmp_path, alone[0]))
    assert ours[0].splits == theirs[0].splits
    # Not the key biases: softmax does not see them, and Adam makes steps of their rounding noise. Measured of the rest:
    # 1.4e-5, of a gate, whose gradient is next to nothing while its experts are still alike.
    seen = [name for name in theirs[1] if not name.endswith("k_proj.bias")]
    assert max(float((ours[1][name] - theirs[1][name]).abs().max()) for name in seen) <= 5e-5



def test_growth_is_what_changes_the_losses(
    stream: Path, alone: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    """Negative control for the comparison above."""
    losses = sessions(tmp_path, recipe(stream, replay=0.25), [1, 1, 1])
    assert max(abs(losses[step] - alone[1][step]) for step in range(1, 5)) <= 1e-6
    assert abs(losses[12] - alone[1][12]) > 1e-4


def test_one_mega_batch_is_a_plain_run(stream: Path, tmp_path: Path) -> None:
    streamed = Gang(tmp_path / "a", recipe(stream, batches=1, steps=4)).run().losses()
    plain = make_recipe(stream / "mega-1", steps=4, model=MODEL)
    assert Gang(tmp_path / "b", plain).run().losses() == streamed


def test_a_missing_directory_is_waited_for(stream: Path, tmp_path: Path) -> None:
    shutil.copytree(stream / "mega-1", tmp_path / "mega-1")
    spec = recipe(tmp_path, batches=2, steps=4)
    Gang(tmp_path, spec, attempt=1).run(expect=int(WAITS))
    second = Gang(tmp_path, spec, world=2, attempt=2).run(expect=int(WAITS))
    assert f"{tmp_path / 'mega-2'} is not there" in second.logs()
    beat = second.heartbeat()
    assert beat is not None
    assert beat.checkpoint is not None
    assert beat.checkpoint.step == 2
    shutil.copytree(stream / "mega-2", tmp_path / "mega-2")
    assert sorted(Gang(tmp_path, spec, attempt=3).run().losses()) == [3, 4]


def test_what_cannot_be_gone_on_with_is_named_in_one_line(stream: Path, tmp_path: Path) -> None:
    shutil.copytree(stream / "mega-1", tmp_path / "mega-1")
    spec = recipe(tmp_path, batches=2, steps=4)
    Gang(tmp_path, spec, attempt=1).run(expect=int(WAITS))
    (tmp_path / "tiny.txt").write_text("too little")
    tokenizer = str(tmp_path / "mega-1" / "tokenizer.json")
    prepare([str(tmp_path / "tiny.txt")], str(tmp_path / "mega-2"), Options(tokenizer=tokenizer, valid_fraction=0.0))
    empty = Gang(tmp_path, spec, attempt=2).run(expect=int(ExitCode.BAD_DATA))
    assert str(tmp_path / "mega-2") in empty.logs()
    assert f"less than one block of {SEQUENCE + 1}" in empty.logs()
    other = {**spec, "anytime": {"megaBatches": 4}}
    changed = Gang(tmp_path, other, attempt=3).run(expect=int(ExitCode.BAD_RECIPE))
    assert "anytime.megaBatches: was 2 when" in changed.logs()
    shutil.rmtree(tmp_path / "mega-2")
    shutil.copytree(stream / "mega-2", tmp_path / "mega-2")
    grows = {**spec, "anytime": {"megaBatches": 2, "growEvery": 1}}
    assert "anytime.growEvery: was 0" in Gang(tmp_path, grows, attempt=4).run(expect=int(ExitCode.BAD_RECIPE)).logs()


def test_trireme_run_waits_for_directories(stream: Path, tmp_path: Path) -> None:
    shutil.copytree(stream / "mega-1", tmp_path / "mega-1")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(Path(), batches=2, steps=4, growEvery=1)))
    command = [
        sys.executable, "-m", "trireme_cli.main", "run", str(tmp_path / "recipe.yaml"), "--nproc", "2",
        "--data-root", str(tmp_path), "--dir", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        lines.extend(iter(process.stdout.readline, ""))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        until = time.monotonic() + 120
        while not any("waits for" in line and "trireme:" in line for line in lines):
            assert time.monotonic() < until, "".join(lines)
            assert process.poll() is None, "".join(lines)
            time.sleep(0.1)
        shutil.copytree(stream / "mega-2", tmp_path / "mega-2")
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(timeout=10)
    assert any("step 2: waits for" in line and "mega-2" in line for line in lines), "".join(lines)
    assert any("grown to" in line for line in lines)
