"""Trireme beside Hugging Face Transformers with Accelerate FSDP2: same model, weights, samples and shapes, A B A B.

    python benchmarks/train/compare.py                     # what fits the device here; about ten minutes on two cores
    python benchmarks/train/compare.py --only opt-8m --rounds 1

Each run is a fresh set of processes. Trireme runs as under the agent (data pipeline, step log, heartbeat); the peer's
data lie in memory and it logs nothing. Figures are medians over the timed steps of all rounds; the fastest step stands
beside them, for machines that are shared. Both must report the same losses, or the comparison is void and the exit
code 1. Prints a table, writes JSON. On CPUs Accelerate's FSDP2 is switched on by hand (see peer.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cases import Case, for_cpu, for_gpu, write_corpus
from trireme_api.devices import device_peak
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.telemetry.metering import Arithmetic

HERE = Path(__file__).resolve().parent
LOSS_TOLERANCE = {"fp32": 2e-4, "bf16": 3e-2}
"""Of the largest difference over all steps: other kernels and orders of summation, grown through a few AdamW steps."""
MEBI = 2**20
RUN_SECONDS = 1800
"""A run that takes longer has failed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=2, help="of A B")
    parser.add_argument("--steps", type=int, help="instead of each case's own number")
    parser.add_argument("--output", type=Path, help="JSON; left out: benchmarks/results/train-DEVICE-DATE.json")
    options = parser.parse_args()
    machine = describe_machine()
    cases = for_gpu(machine["devices"]) if machine["devices"] else for_cpu()
    cases = [case for case in cases if options.only in case.name]
    if options.steps:
        cases = [Case(**{**vars(case), "steps": max(options.steps, case.warm + 1)}) for case in cases]
    if not cases:
        sys.exit(f"--only {options.only!r}: no such case")
    directory = Path(tempfile.mkdtemp(prefix="train-benchmark-"))
    try:
        corpus = write_corpus(directory, cases)
        rows = [measure(case, corpus, directory / str(i), options.rounds, machine) for i, case in enumerate(cases)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    machine["loadAverageAfter"] = round(os.getloadavg()[0], 2)
    print(table(rows))
    output = options.output or HERE.parent / "results" / f"train-{slug(machine['device'])}-{machine['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine, "rounds": options.rounds, "cases": rows}, indent=1) + "\n")
    print(f"written to {output}")
    if any(row["lossesDiffer"] for row in rows):
        sys.exit("losses differ: the two did not do the same work")


def measure(case: Case, corpus: Path, directory: Path, rounds: int, machine: dict[str, Any]) -> dict[str, Any]:
    recipe = case.recipe(corpus)
    runs: dict[str, list[dict[str, Any]]] = {"trireme": [], "accelerate": []}
    for number in range(rounds):
        for who, launch in (("trireme", run_trireme), ("accelerate", run_peer)):
            work = directory / f"{who}-{number}"
            work.mkdir(parents=True)
            runs[who].append(launch(case, recipe, work))
            seconds = statistics.median(runs[who][-1]["steps"])
            print(f"{case.name}: round {number + 1}, {who}: {seconds:.3f} s per step", flush=True)
    spec = Recipe.model_validate(recipe)
    arithmetic = Arithmetic.of(check_recipe(spec), spec, device_peak(machine["device"]))
    row: dict[str, Any] = {"case": case.name, "shape": case.shape, **vars(case)}
    for who, results in runs.items():
        steps = [step for result in results for step in result["steps"]]
        seconds = statistics.median(steps)
        figures = arithmetic.figures(case.tokens, seconds, 1, case.ranks)
        row[who] = {
            "stepSeconds": seconds,
            "fastestStepSeconds": min(steps),
            "stepSecondsOfRuns": [[round(step, 4) for step in result["steps"]] for result in results],
            "tokensPerSecond": figures.tokens_per_second,
            "modelTflopsPerDevice": figures.model_tflops,
            "mfu": figures.mfu,
            "mfuPalm": figures.mfu_palm,
            "firstStepSeconds": statistics.median(result["firstStepSeconds"] for result in results),
            "peakMemoryBytes": max(result["peakMemoryBytes"] for result in results),
        }
    losses = zip(runs["trireme"][0]["losses"], runs["accelerate"][0]["losses"], strict=True)
    row["largestLossDifference"] = max(abs(ours - theirs) for ours, theirs in losses)
    row["lossesDiffer"] = row["largestLossDifference"] > LOSS_TOLERANCE[case.precision]
    for name, seconds in (("speedup", "stepSeconds"), ("speedupOfFastestSteps", "fastestStepSeconds")):
        row[name] = row["accelerate"][seconds] / row["trireme"][seconds]
    return row


def run_trireme(case: Case, recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    places = dict.fromkeys(("TRIREME_LOG_DIR", "TRIREME_HEARTBEAT_DIR"), str(work))
    environment = {"TRIREME_RECIPE": json.dumps(recipe), **places}
    launch(case, [sys.executable, "-m", "trireme_trainer"], environment, work)
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    ended = next(row for row in rows if row.get("event") == "ended")
    return {
        "steps": [row["seconds"] for row in steps[case.warm :]],
        "firstStepSeconds": steps[0]["seconds"],
        "losses": [row["loss"] for row in steps],
        "peakMemoryBytes": ended["peakMemoryBytes"],
    }


def run_peer(case: Case, recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    (work / "recipe.json").write_text(json.dumps(recipe))
    output = work / "result.json"
    command = [sys.executable, str(HERE / "peer.py"), str(work / "recipe.json"), str(case.warm), str(output)]
    launch(case, command, {"TOKENIZERS_PARALLELISM": "false"}, work)
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def launch(case: Case, command: list[str], environment: dict[str, str], work: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, **environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks), "OMP_WAIT_POLICY": "PASSIVE"}
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // case.ranks)))
    common.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    ranks: list[subprocess.Popen[bytes]] = []
    for number in range(case.ranks):
        log = (work / f"rank-{number}.log").open("w")
        env = {**common, "RANK": str(number), "LOCAL_RANK": str(number)}
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    codes: list[int | None]
    try:
        codes = [rank.wait(RUN_SECONDS) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.wait()
    if codes != [0] * case.ranks:
        tail = "\n".join((work / f"rank-{i}.log").read_text()[-3000:] for i, code in enumerate(codes) if code != 0)
        sys.exit(f"{case.name}: {' '.join(command[:3])} ended with {codes}\n{tail}")


def describe_machine() -> dict[str, Any]:
    """Without importing torch here: it must not hold memory beside the runs."""
    probe = (
        "import torch; n = torch.cuda.device_count(); "
        "print(n, torch.cuda.get_device_name(0) if n else 'cpu', sep='\\t')"
    )
    devices, device = subprocess.check_output([sys.executable, "-c", probe], text=True).strip().split("\t")
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, cwd=HERE, check=False)
    return {
        "device": device,
        "devices": int(devices),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("trireme", "torch", "transformers", "accelerate")},
        "commit": commit.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loadAverageBefore": round(os.getloadavg()[0], 2),
    }


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Shape: ranks × micro-batches × sequences × tokens."""
    lines = [
        "| case | shape | Trireme tok/s | Accelerate tok/s | ratio | of fastest | TFLOP/s per device | MFU "
        "| memory MiB, ours / theirs | first step s, ours / theirs | loss difference |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours, theirs = row["trireme"], row["accelerate"]
        mfu = f"{ours['mfu']:.1%}" if ours["mfu"] is not None else "unknown"
        lines.append(
            f"| {row['case']} | {row['shape']} | {ours['tokensPerSecond']:,.0f} | {theirs['tokensPerSecond']:,.0f} "
            f"| {row['speedup']:.2f} | {row['speedupOfFastestSteps']:.2f} | {ours['modelTflopsPerDevice']:.4g} | {mfu} "
            f"| {ours['peakMemoryBytes'] / MEBI:,.0f} / {theirs['peakMemoryBytes'] / MEBI:,.0f} "
            f"| {ours['firstStepSeconds']:.2f} / {theirs['firstStepSeconds']:.2f} "
            f"| {row['largestLossDifference']:.1e}{' DIFFER' if row['lossesDiffer'] else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
