"""What all metering costs a training step: heartbeat, step log, ledger, series and their scraping, energy, reports.

    unshare --pid --fork --mount-proc .venv/bin/python benchmarks/metering/overhead.py \
        --tokens 4096 --window 2.5 --output benchmarks/results/metering-cpu.json

In process ids of its own (unshare, root) and with heartbeats on a tmpfs, as in a pod. One run of the real trainer
under the real agent, whose metering is switched on and off every second (rank.py). Three ways:

- on beside off: CPU seconds per step of rank and agent together, so that other work on the machine counts little;
- step time on beside off, by the clock: for a machine that does nothing else;
- direct: CPU time inside the metering calls of the training thread, and of the agent's process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "cluster")]

from localcluster.apiserver import free_ports  # noqa: E402
from trireme_api.protocol import Env  # noqa: E402
from trireme_cli.local_plan import Options, plan_recipe  # noqa: E402
from trireme_cli.run import LocalRun  # noqa: E402

from demo.corpus import corpus  # noqa: E402
from demo.training import cpu_model, own_time  # noqa: E402

SCRAPE_SECONDS = 15.0
RECIPE: dict[str, Any] = {
    "model": {"preset": "opt-8m", "overrides": {"vocabularySize": 1024, "dropout": 0.0}},
    "data": {"sources": [{"path": "corpus"}], "sequenceLength": 128},
    "optimizer": {"learningRate": 1.0e-3},
    "schedule": {"warmupTokens": 10240, "decay": "constant"},
    "precision": "fp32",
}


def repetition(folder: Path, seconds: float, window: float, tokens: int) -> list[dict[str, Any]]:
    """The windows of one run of about so many seconds."""
    windows = folder / "windows.jsonl"
    recipe = folder / "recipe.yaml"
    ours = {"batch": {"tokens": tokens, "micro": 4}, "until": {"steps": 1_000_000}}
    recipe.write_text(yaml.safe_dump({**RECIPE, **ours}))
    options = Options(nproc=1, every=1_000_000, data_root=folder.parent, directory=folder / "run")
    plan = plan_recipe(recipe, options, {**os.environ, "OMP_NUM_THREADS": "1"})
    trainer, agent = free_ports(2)
    plan.environment.update({
        Env.AGENT_REPORT_SECONDS: "5", Env.AGENT_METRICS_PORT: str(agent), Env.METRICS_PORT: str(trainer),
        "BENCHMARK_WINDOWS": str(windows), "BENCHMARK_WINDOW_SECONDS": str(window),
    })  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("rank.py"))]
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_SECONDS):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{agent}/metrics", timeout=10) as page:
                page.read()

    threading.Thread(target=scrape, daemon=True).start()
    with plan.scratch, open(os.devnull, "w") as nowhere:
        run = LocalRun(
            dataclasses.replace(plan, command=command), options, Console(file=nowhere), 0, 60.0, quiet=True
        )  # fmt: skip
        threading.Thread(target=_stop_after, args=(run, windows, seconds), daemon=True).start()
        run.run()
    over.set()
    return [json.loads(line) for line in windows.read_text().splitlines()]


def _stop_after(run: LocalRun, windows: Path, seconds: float) -> None:
    """From the first window on; an agent that is stopped just then goes on with the next window."""
    while not windows.exists() or not windows.stat().st_size:
        time.sleep(0.2)
    time.sleep(seconds)
    run._coordinator.request_stop()


def figures(windows: list[dict[str, Any]]) -> dict[str, float]:
    """Of one repetition; windows of the two kinds in equal number."""
    whole = windows[: len(windows) // 4 * 4]
    on, off = ([w for w in whole if w["on"] is kind] for kind in (True, False))
    steps = sum(w["steps"] for w in on)
    cost = [sum(w["rankCpu"] + w["agentCpu"] for w in half) / sum(w["steps"] for w in half) for half in (on, off)]
    clock = [sum(w["seconds"] for w in half) / sum(w["steps"] for w in half) for half in (on, off)]
    seconds = sum(w["seconds"] for w in on)
    return {
        "steps": float(sum(w["steps"] for w in whole)),
        "stepSeconds": clock[1],
        "clockOnBesideOff": clock[0] / clock[1] - 1,
        "cpuSecondsPerStepOn": cost[0],
        "cpuSecondsPerStepOff": cost[1],
        "onBesideOff": cost[0] / cost[1] - 1,
        "microsecondsPerStep": 1e6 * sum(w["meteredCpu"] for w in on) / steps,
        "agentShareOfACore": sum(w["agentCpu"] for w in on) / seconds,
    }


def summary(repetitions: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median": statistics.median(found[name] for found in repetitions),
            "least": min(found[name] for found in repetitions),
            "most": max(found[name] for found in repetitions),
        }
        for name in repetitions[0]
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Median, least, most."""
    direct, agent = found["microsecondsPerStep"]["median"], found["agentShareOfACore"]["median"]
    lines = [
        _row("CPU seconds per step, on", found["cpuSecondsPerStepOn"], 1e3, "ms"),
        _row("CPU seconds per step, off", found["cpuSecondsPerStepOff"], 1e3, "ms"),
        _row("CPU, on beside off", found["onBesideOff"], 100, "%"),
        _row("step time, off", found["stepSeconds"], 1e3, "ms"),
        _row("step time, on beside off", found["clockOnBesideOff"], 100, "%"),
        _row("in the training thread, per step", found["microsecondsPerStep"], 1, "µs"),
        _row("agent, of one core", found["agentShareOfACore"], 100, "%"),
    ]
    for step in (0.1, 1.0):
        lines.append(
            f"of a step of {step:g} s: {direct / 1e4 / step:.3f} % in the training thread; "
            f"{direct / 1e4 / step + 100 * agent:.3f} % where the agent has no core to spare"
        )
    return "\n".join(lines)


def _row(what: str, value: dict[str, float], scale: float, unit: str) -> str:
    median, least, most = (scale * value[name] for name in ("median", "least", "most"))
    return f"{what:<34} {median:9.3f} {unit:<2} ({least:.3f} to {most:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each, from the first window on")
    parser.add_argument("--window", type=float, default=1.0, help="seconds that metering stays on, or off")
    parser.add_argument("--tokens", type=int, default=512, help="of a step: its length")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="metering-benchmark-") as folder:
        place = Path(folder)
        prepare = [str(Path(sys.executable).parent / "trireme"), "prepare", str(corpus()), "--vocabulary", "1024"]
        more = ["--include", "*.txt", "--document-separator", "blank-line", "--output", str(place / "corpus")]
        subprocess.run([*prepare, *more], check=True, stdout=subprocess.DEVNULL)
        tempfile.tempdir = "/dev/shm"  # from here on: heartbeats
        for number in range(options.repetitions):
            here = place / f"r{number}"
            here.mkdir()
            found.append(figures(repetition(here, options.seconds, options.window, options.tokens)))
            print(json.dumps({name: round(value, 6) for name, value in found[-1].items()}), flush=True)
    whole = summary(found)
    print(table(whole))
    if options.output:
        about = {"measuredAt": own_time(), "machine": cpu_model(), "load": round(os.getloadavg()[1], 1)}
        how = {"recipe": RECIPE, "tokens": options.tokens, "window": options.window}
        result = {"format": 1, **about, **how, "summary": whole, "repetitions": found}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
