"""`make chaos` and `make chaos-local`: every fault n times, checked, measured, stored, printed.

python tests/chaos/run.py local --n 5 --faults rank-sigkill,pod-deleted
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "tests/apiserver", "cluster")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A pod's command says `python3`: here that is the one of this environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

from chaos import measure, table  # noqa: E402
from chaos.arena import Arena, Job, Watch, wait_until  # noqa: E402
from chaos.faults import FAULTS, Fault, Scene, chosen  # noqa: E402
from chaos.measure import Broken, Trial  # noqa: E402
from demo.corpus import corpus  # noqa: E402
from demo.training import VOCABULARY, cpu_model, own_time  # noqa: E402

EVERY = 20
"""Steps between checkpoints."""
UNDISTURBED_STEPS = 200
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "chaos.md"
FORMAT = 1


def spec(steps: int) -> dict[str, Any]:
    """A small model on two pods. Every rung of the ladder has budget for all trials; the learning rate does not
    depend on when training ends, so that runs of different lengths have the same losses."""
    return {
        "recipe": {
            "model": {"preset": "opt-8m", "overrides": {"vocabularySize": 1024, "dropout": 0.0}},
            "data": {"sources": [{"path": "pvc://corpus/debian"}], "sequenceLength": 128},
            "batch": {"tokens": 512, "micro": 2},
            "optimizer": {"learningRate": 1.0e-3},
            "schedule": {"warmupTokens": 10240, "decay": "constant"},
            "precision": "fp32",
            "until": {"steps": steps},
        },
        "replicas": {"desired": 2},
        "checkpoint": {"uri": "pvc://checkpoints/JOB", "everySteps": EVERY, "keep": 3},
        "template": {
            "resources": {"requests": {"cpu": "200m", "memory": "768Mi"}, "limits": {"memory": "3Gi"}},
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "terminationGracePeriodSeconds": 20,
        },
        "failurePolicy": {
            "ladder": [
                {"action": "RestartProcess", "max": 1000, "timeoutSeconds": 120},
                {"action": "ReplacePod", "max": 1000, "timeoutSeconds": 300},
                {"action": "RestartGang", "max": 1000, "timeoutSeconds": 600},
            ]
        },
        # The faults are ours, not the nodes'.
        "nodePolicy": {"avoidAfterFailures": 0},
    }


@contextlib.contextmanager
def running(arena: Arena, name: str, steps: int) -> Iterator[Job]:
    """A job that is removed afterwards, whatever happened to it."""
    wanted = spec(steps)
    wanted["checkpoint"]["uri"] = f"pvc://checkpoints/{name}"
    arena.submit(name, wanted)
    try:
        yield Job(arena, name, EVERY)
    finally:
        arena.remove(name)


def undisturbed(arena: Arena) -> dict[int, float]:
    """Step → loss of a run that nothing disturbs: what every other run must reproduce."""
    with running(arena, "undisturbed", UNDISTURBED_STEPS) as job:
        job.wait_for("its first step", lambda: job.curve().rows, 240)
        wait_until("the undisturbed run ends", lambda: job.status().get("phase") == "Succeeded", 600, every=0.5)
        losses = job.curve().newest()
        if list(losses) != list(range(1, UNDISTURBED_STEPS + 1)):
            raise Broken("the undisturbed run has not every step")
        say(f"  {UNDISTURBED_STEPS} steps, {measure.step_seconds(job.curve(), 200):.3f} s each")
        return losses


def trial(fault: Fault, job: Job, away: float) -> Trial:
    """Breaks the job once, waits until it is whole, checks everything, measures. Raises Broken."""
    if fault.spares_ready:
        job.steady()
        job.spares_ready()
    job.steady()
    before = job.status()
    attempt, restarts = int(before["attempt"]), int(before.get("restartCount") or 0)
    scene = Scene(job, away)
    with Watch(job) as watch:
        try:
            at = fault.inject(scene)
            if fault.attempts:
                job.wait_for("a first new step", lambda: measure.first_new(job.curve(), attempt), 240)
        finally:
            scene.heal()
        until = time.time()
        job.further(10)
        if fault.kind == "recovery" and fault.restarts:
            job.wait_for("recovery times in status", lambda: _timed(job), 30)
    watch.check()
    status = job.status()
    _counts(fault, status, attempt, restarts)
    lines, curve = job.lines(), job.curve()
    if fault.kind == "pause":
        length = measure.pause(curve, at, until)
        gap = 0.0 if fault.log_on_same_disk else length
        if fault.log_on_same_disk:
            scene.facts["secondsWithoutLog"] = round(length, 3)
        return Trial(total=gap, facts=scene.facts)
    found = measure.recovered(at, attempt, lines, curve, status, **scene.facts)
    if fault.keeps_every_step and found.lost_steps:
        raise Broken(f"{found.lost_steps} steps were done twice, though the ranks had been asked to save")
    return found


def _timed(job: Job) -> bool:
    return "firstStep" in ((job.status().get("lastFailure") or {}).get("phases") or {})


def _counts(fault: Fault, status: dict[str, Any], attempt: int, restarts: int) -> None:
    made, charged = int(status["attempt"]) - attempt, int(status.get("restartCount") or 0) - restarts
    if (made, charged) != (fault.attempts, fault.restarts):
        raise Broken(
            f"{made} new attempts and {charged} restarts, expected {fault.attempts} and {fault.restarts}: "
            f"{(status.get('lastFailure') or {}).get('message')}"
        )


def run_fault(fault: Fault, arena: Arena, n: int, away: float, losses: dict[int, float]) -> dict[str, Any]:
    """All trials of one fault, in one job; the result as it is stored."""
    say(f"\n{fault.name}: {fault.what}")
    trials: list[dict[str, Any]] = []
    broken = ""
    compared = 0
    try:
        with running(arena, fault.name, 1_000_000) as job:
            for number in range(1, n + 1):
                found = trial(fault, job, away).as_json()
                trials.append(found)
                say(f"  {number}/{n} total {found['total']:6.2f} s  lost steps {found['lostSteps']:>3}  "
                    + "  ".join(f"{k} {v:.2f}" for k, v in found["phases"].items())
                    + (f"  {json.dumps(found['facts'])}" if found.get("facts") else ""))  # fmt: skip
            compared = measure.as_undisturbed(job.curve(), losses)
    except Broken as error:
        broken = str(error)
        say(f"  BROKEN: {broken}")
    summary = table.summary(trials)
    return {
        "what": fault.what,
        "kind": fault.kind,
        "target": fault.target,
        "detectTarget": fault.detect,
        "verdict": f"broken: {broken}" if broken else table.verdict(summary, fault.target, fault.detect),
        "summary": summary,
        "stepsAsUndisturbed": compared,
        "measuredAt": own_time(),
        "load": round(os.getloadavg()[0], 1),
        "trials": trials,
    }


def stored(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if found.get("format") == FORMAT else {}
    except (OSError, ValueError):
        return {}


def store(where: str, results: dict[str, Any]) -> Path:
    """Adds to what earlier runs have measured: a fault that is run again replaces its own line only."""
    path = RESULTS / f"chaos-{where}.json"
    known = stored(path).get("faults", {})
    known.update(results)
    order = [fault.name for fault in FAULTS]
    faults = {name: known[name] for name in sorted(known, key=lambda n: order.index(n) if n in order else 99)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "machine": cpu_model(), "everySteps": EVERY, "faults": faults}
    path.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(table.put(PAGE.read_text(), where, table.markdown(faults)))
    return path


def shards(folder: Path) -> None:
    """The demo's corpus, tokenised by the user's own command; pods run as another user than we do."""
    command = [
        str(Path(sys.executable).parent / "trireme"), "prepare", str(corpus()), "--output", str(folder),
        "--include", "*.txt", "--document-separator", "blank-line", "--vocabulary", str(VOCABULARY), "--overwrite",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"trireme prepare: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextlib.contextmanager
def open_arena(where: str) -> Iterator[Arena]:
    if where == "cluster":
        from chaos.cluster import ClusterArena

        there = ClusterArena.up()
        shards(there.claim("corpus") / "debian")
        yield there
        return
    from chaos.local import LocalArena

    with tempfile.TemporaryDirectory(prefix="trireme-chaos-") as folder, LocalArena(Path(folder)) as arena:
        shards(arena.claim("corpus") / "debian")
        yield arena


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("where", choices=["local", "cluster"])
    parser.add_argument("--n", type=int, default=5, help="trials of each fault")
    parser.add_argument("--faults", default="", help="comma-separated; default: all")
    parser.add_argument("--away", type=float, default=60.0, help="seconds that what goes away stays away")
    parser.add_argument("--no-store", action="store_true", help="print only; the stored results stay")
    options = parser.parse_args()
    if options.n < 1:
        parser.error(f"--n {options.n}: must be at least 1")
    try:
        faults = chosen(options.where, options.faults)
    except ValueError as error:
        parser.error(str(error))
    if os.geteuid():
        say("the chaos suite needs root: it mounts a small disk, and reads and signals processes of pods")
        return 1
    # Everything that was started ends with the run, also when it is stopped from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open_arena(options.where) as arena:
        say("undisturbed: what every other run must reproduce")
        losses = undisturbed(arena)
        results = {}
        for fault in faults:
            results[fault.name] = run_fault(fault, arena, options.n, options.away, losses)
            if not options.no_store:
                store(options.where, {fault.name: results[fault.name]})
    say("\n" + table.markdown(results))
    bad = {name: found["verdict"] for name, found in results.items() if found["verdict"] not in ("met", "measured")}
    for name, what in bad.items():
        say(f"{name}: {what}")
    say(f"{len(results) - len(bad)} of {len(results)} faults as promised")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
