"""Figures from the first minute: in `kubectl get tj`, on the endpoints of operator, agent and trainer, and by `trireme
logs` and `trireme report`, which ask the kubelets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_support import EVERY, Jobs, operator_pods
from prometheus_client.parser import text_string_to_metric_families
from trireme_api.protocol import AGENT_METRICS_PORT, TRAINER_METRICS_PORT

from demo.kube import Kube
from demo.target import SYSTEM, Target
from demo.training import Run, recover, started

Sample = tuple[dict[str, str], float]


def scrape(kube: Kube, pod: str, port: int) -> dict[str, list[Sample]]:
    """What Prometheus would read, by metric name. Asked from inside the pod: the machine itself has no way in."""
    script = (
        f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/metrics', timeout=10).read().decode())"
    )
    text = kube.exec(pod, "python3", "-c", script)
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def test_every_part_tells_its_figures(job: dict[str, Any], jobs: Jobs, target: Target, tmp_path: Path) -> None:
    job["spec"]["recipe"]["until"] = {"steps": 1000}
    run = jobs.run(job, "figures")
    started(run)
    run.wait_for("speed and energy in status", lambda: _told(run.status()), 120)
    check_endpoints(run, target)
    check_table(run)
    run.wait_for("steps beyond a checkpoint", lambda: run.curve().last_step() > EVERY + 3, 240)
    recover(run, slot=1)
    check_commands(run, tmp_path)


def check_endpoints(run: Run, target: Target) -> None:
    pod = run.pod_of_slot(0)

    trainer = scrape(run.kube, pod, TRAINER_METRICS_PORT)
    assert 0 < trainer["trireme_train_loss"][0][1] < 10
    assert trainer["trireme_train_tokens_per_second"][0][1] > 0
    assert trainer["trireme_train_model_tflops"][0][1] > 0
    assert "trireme_train_mfu" not in trainer, "an MFU on a device whose peak nobody knows is a guess"

    agent = scrape(run.kube, pod, AGENT_METRICS_PORT)
    (cpu,) = agent["trireme_cpu_energy_joules_total"]
    assert cpu[0]["source"] in ("rapl", "declared")
    assert cpu[1] > 0
    assert agent["trireme_agent_rank_up"][0][1] == 1

    (leader,) = operator_pods(target)
    operator = scrape(target.kube.within(SYSTEM), leader["metadata"]["name"], 8080)
    mine = {"namespace": run.kube.namespace, "job": run.name}
    phases = [
        labels["phase"] for labels, value in operator["trireme_job_phase"] if mine.items() <= labels.items() and value
    ]
    assert phases == ["Running"]
    assert operator["trireme_leader"][0][1] == 1
    refused = [labels for labels, value in operator["trireme_api_requests_total"] if labels["code"] == "403" and value]
    assert not refused, "the operator needs a right that its role does not give"


def check_table(run: Run) -> None:
    table = run.kube.out("get", "trainingjob", run.name)
    header, row = table.splitlines()
    columns = {found[0]: found.start() for found in re.finditer(r"\S+", header)}
    assert list(columns)[:8] == ["NAME", "PHASE", "NODES", "STEP", "LOSS", "TOK/S", "TFLOPS", "MFU"]

    def shown(column: str) -> str:
        """Cells may be empty: where a column begins is what tells them apart."""
        return (row[columns[column] :].split("  ")[0]).strip()

    assert [shown(name) for name in ("NAME", "PHASE", "NODES")] == [run.name, "Running", "2/2"]
    assert re.fullmatch(r"\S*[\d.]+m?k?g", shown("CO2E")), f"no CO2e in {table}"
    assert shown("MFU") == "", "an MFU of a device whose peak nobody knows"


def check_commands(run: Run, folder: Path) -> None:
    """After a rank was killed: two attempts in the same pods."""

    def trireme(*arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "trireme"), *arguments]
        command += ["--kubeconfig", str(run.kube.kubeconfig), "-n", run.kube.namespace]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=folder)
        assert done.returncode == 0, f"trireme {arguments[0]}: {done.stdout}{done.stderr}"
        assert not done.stderr, done.stderr
        return done.stdout

    second = trireme("logs", run.name, "--rank", "0", "--attempt", "2").splitlines()
    logs = trireme("logs", run.name).splitlines()  # later, so that it has all of those lines
    assert {line.split("]")[0] for line in logs} >= {"[rank 0", "[rank 1", f"[{run.pod_of_slot(0)}"}
    assert [line for line in logs if re.match(r"\[rank 0\] .*step 1/1000: loss", line)], "what rank 0 said first"
    assert second
    assert all(line.startswith("[rank 0] ") for line in second)
    assert set(second) < set(logs)

    # The step log lies in a claim: it is read by a command in a running pod.
    told = json.loads(trireme("report", run.name, "--json"))
    assert not told["steps_missing"]
    rows = told["steps"]["rows"]
    assert {row["attempt"] for row in rows} == {1, 2}
    losses = {(row.attempt, row.step): row.loss for row in run.curve().rows}
    assert all(losses[row["attempt"], row["step"]] == pytest.approx(row["loss"], rel=1e-3) for row in rows)
    assert told["energy"]["joules"] > 0
    assert [bar["attempt"] for bar in told["bars"]] == ["1", "2"]
    trireme("report", run.name, "-o", "page.html")
    page = (folder / "page.html").read_text()
    assert "Content-Security-Policy" in page
    assert "attempt 2 goes on at step" in page


def _told(status: dict[str, Any]) -> bool:
    progress, carbon = status.get("progress") or {}, status.get("carbon") or {}
    return bool(progress.get("tokensPerSecond") and progress.get("tflops") and carbon.get("grams"))
