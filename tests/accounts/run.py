"""`make accounts`: one job on the local cluster, two failures, a suspension; then every figure of it beside every other
and beside what was measured from outside.

python tests/accounts/run.py --minutes 20
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("", "tests", "tests/apiserver", "tests/e2e", "tests/monitoring", "cluster")
sys.path[:0] = [str(ROOT / part) for part in PARTS]

from chaos.arena import Job, kill, rank_of, wait_until  # noqa: E402
from chaos.cluster import NAMESPACE, ClusterArena  # noqa: E402
from chaos.measure import Broken, events  # noqa: E402
from chaos.run import shards  # noqa: E402
from localcluster.prometheus import Prometheus  # noqa: E402
from scraping import config  # noqa: E402
from ways import discovering, proxy  # noqa: E402

from accounts import judge, scrape  # noqa: E402
from accounts.background import Background  # noqa: E402
from accounts.powercap import SimulatedPowercap  # noqa: E402
from accounts.witness import Witness  # noqa: E402
from demo import target as clusters  # noqa: E402
from demo.kube import Kube  # noqa: E402
from demo.target import OPERATOR, SYSTEM, Target  # noqa: E402
from demo.training import cpu_model, own_time  # noqa: E402

NAME = "accounts"
ZONE = "DE"
INTERVAL = 5
"""Seconds between scrapes."""
MORE_STEPS = 20
"""Done after the suspension."""
SERIES = {
    "step": "", "tokens": "", "lost_steps": "", "goodput_ratio": "", "seconds_total": "state",
    "failures_total": "cause", "restarts_total": "kind", "energy_joules": "", "carbon_grams": "scope",
    "carbon_grams_per_million_tokens": "",
}  # fmt: skip
RESULT = ROOT / "benchmarks" / "results" / "accounts.json"


def spec() -> dict[str, Any]:
    """The demo's job; its learning rate does not depend on when training ends."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "manifests" / "samples" / "opt-8m-cpu.yaml").read_text())["spec"]
    found["recipe"]["until"] = {"steps": 1_000_000}
    found["recipe"]["schedule"] = {"warmupTokens": 20480, "decay": "constant"}
    found["checkpoint"]["uri"] = f"pvc://checkpoints/{NAME}"
    found["carbonPolicy"] = {"zone": ZONE}
    return found


@contextlib.contextmanager
def counters_mounted(kube: Kube, folder: Path | None) -> Iterator[None]:
    """The operator mounts this folder into the pods it makes, as `--powercap` says."""

    def told(value: str) -> None:
        kube.out("set", "env", f"deployment/{OPERATOR}", f"TRIREME_POWERCAP{value}")
        kube.out("rollout", "status", f"deployment/{OPERATOR}", "--timeout=180s", timeout=200)

    told(f"={folder}")
    try:
        yield
    finally:
        told("-")


class Clock(Background):
    """Watches the status: how long each attempt was the newest row of the ledger, by our own clock."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self.since: dict[int, float] = {}
        """Unix time at which an attempt's row was first seen."""
        self.ended = 0.0

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            try:
                status = self._job.status()
            except (OSError, ValueError):
                continue
            for row in (status.get("goodput") or {}).get("attempts") or []:
                self.since.setdefault(row["attempt"], time.time())
            if status.get("phase") == "Succeeded" and not self.ended:
                self.ended = time.time()

    def attempts(self) -> dict[int, float]:
        begins = [*sorted(self.since.values()), self.ended]
        return {
            number: end - begin
            for number, begin, end in zip(sorted(self.since), begins, begins[1:], strict=False)
        }


def drive(job: Job, minutes: float, began: float) -> int:
    """Two failures at a third and two thirds of the time, then a suspension, some more steps, the end. Returns how many
    failures were inflicted."""

    def until(share: float) -> None:
        while time.time() < began + 60 * minutes * share:
            time.sleep(1)

    def inflict(what: str, how: Callable[[], object]) -> None:
        job.steady()
        attempt = job.attempt()
        say(f"{time.time() - began:6.0f} s  step {job.curve().last_step()}: {what}")
        how()
        job.wait_for("a step of a new attempt", lambda: job.curve().attempts()[-1] > attempt, 240)

    until(1 / 3)
    inflict("SIGKILL to a rank", lambda: kill(rank_of(job.pod(1))))
    until(2 / 3)
    inflict("a pod deleted with no grace", lambda: job.arena.delete_pod(job.pod(1)["metadata"]["name"], 0))
    until(1)
    job.wait_for("all ranks run", lambda: job.status()["phase"] == "Running", 240)
    say(f"{time.time() - began:6.0f} s  step {job.curve().last_step()}: suspended, resumed, {MORE_STEPS} more steps")
    job.arena.patch(NAME, {"runPolicy": {"suspend": True}})
    wait_until("suspension", lambda: job.status()["phase"] == "Suspended" and not job.arena.pods(NAME), 120, every=0.25)
    end = job.committed() + MORE_STEPS
    job.arena.patch(NAME, {"runPolicy": {"suspend": False}, "recipe": {"until": {"steps": end}}})
    wait_until("the job's end", lambda: job.status()["phase"] == "Succeeded", 300, every=0.25)
    return 2


def trireme(kubeconfig: Path, *arguments: str) -> Any:
    """What the command prints as JSON, as a user runs it."""
    command = [str(Path(sys.executable).parent / "trireme"), *arguments, "--json"]
    command += ["--kubeconfig", str(kubeconfig), "-n", NAMESPACE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise Broken(f"trireme {arguments[0]}: {(done.stderr or done.stdout).strip()}")
    return json.loads(done.stdout)


def books(job: Job, kubeconfig: Path, prometheus: Prometheus) -> judge.Books:
    return judge.Books(
        status=job.status(),
        top=next(row for row in trireme(kubeconfig, "top") if row["name"] == NAME),
        explain=trireme(kubeconfig, "explain", NAME),
        report=trireme(kubeconfig, "report", NAME, "--steps", str(job.folder)),
        prometheus={
            name: scrape.by_labels(prometheus, NAME, f"trireme_job_{name}", label) for name, label in SERIES.items()
        },
    )


def shipped_intensity(zone: str) -> float:
    rows = csv.reader((ROOT / "api/trireme_api/carbon/grid.csv").read_text().splitlines())
    return next(float(row[3]) for row in rows if row[:1] == [zone])


def measure(target: Target, minutes: float, folder: Path) -> tuple[list[judge.Check], dict[str, Any]]:
    arena = ClusterArena(target)
    shards(arena.claim("corpus") / "debian")
    tree = folder / "powercap"
    folder.chmod(0o755)
    job = Job(arena, NAME, 20)
    ways = scrape.OverTheNetwork(arena, folder / "prometheus")
    with contextlib.ExitStack() as held:
        held.enter_context(SimulatedPowercap(tree))
        held.enter_context(counters_mounted(target.kube.within(SYSTEM), tree))
        held.enter_context(discovering(ways))
        way = held.enter_context(proxy(ways))
        made = config(folder / "prometheus", interval=f"{INTERVAL}s", proxy_url=way)
        prometheus = held.enter_context(Prometheus(folder / "prometheus", made))
        arena.remove(NAME)
        witness = held.enter_context(Witness(tree, lambda: arena.pods(NAME)))
        clock = held.enter_context(Clock(job))
        held.callback(arena.remove, NAME)
        began, wanted = time.time(), spec()
        arena.submit(NAME, wanted)
        failures = drive(job, minutes, began)
        wait_until("all pods have ended", lambda: all(_over(pod) for pod in arena.pods(NAME)), 60, every=0.5)
        time.sleep(3 * INTERVAL + 5)  # the last figures are written, and scraped
        found = books(job, target.kube.kubeconfig, prometheus)
        lasted = clock.ended - began
        counters = [
            scrape.counted(values)
            for component in ("cpu", "dram")
            for values in scrape.history(prometheus, NAME, f"trireme_{component}_energy_joules_total", lasted + 120)
        ]
        trained = sum(
            scrape.counted(values)
            for values in scrape.history(prometheus, NAME, "trireme_train_tokens_total", lasted + 120)
        )
        curve, witnessed = job.curve(), witness.joules()
        batch = wanted["recipe"]["batch"]["tokens"]
        checks = judge.sums(found.status, began, clock.ended, clock.attempts())
        checks += judge.training(found, curve, batch, failures)
        checks += judge.footprint(found, witnessed, sum(counters), minutes, 1.1, shipped_intensity(ZONE))
        # Of each attempt the last scrape is up to an interval before its end.
        speed = found.status["progress"]["step"] * batch / lasted
        behind = 3 * speed * INTERVAL * len(curve.attempts())
        checks.append(
            judge.Check("tokens trained, again included", {"step log": len(curve.rows) * batch, "trainer": trained},
                        absolute=behind)
        )  # fmt: skip
        facts = {
            "format": 1, "measuredAt": own_time(), "machine": cpu_model(), "load": round(os.getloadavg()[1], 1),
            "minutes": round(lasted / 60, 2), "attempts": len(found.status["goodput"]["attempts"]),
            "energySource": found.status["energy"]["source"],
            "simulated": "the energy counters of the machine (tests/accounts/powercap.py); all else is real",
            "resumed": [row["step"] for row in events(job.lines(), "resumed")],
            "witness": {"pods": len(witness.by_pod), "joules": witnessed},
            "goodput": found.status["goodput"], "energy": found.status["energy"], "carbon": found.status["carbon"],
        }  # fmt: skip
        (folder / "status.json").write_text(json.dumps(found.status, indent=1))
        return checks, facts


def _over(pod: dict[str, Any]) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--no-store", action="store_true", help="print only; the stored result stays")
    options = parser.parse_args()
    # Everything that was started ends with the run, also when it is stopped from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    target = clusters.up()
    if target.kind != "builtin":
        raise Broken(f"this cluster is {target.kind}; the witness reads control groups of the built-in one's pods")
    clusters.install(target, *clusters.images(target))
    with tempfile.TemporaryDirectory(prefix="trireme-accounts-") as folder:
        checks, facts = measure(target, options.minutes, Path(folder))
    say("\n" + judge.table(checks))
    if not options.no_store:
        facts["checks"] = [check.as_json() for check in checks]
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")
        say(f"\n{RESULT.relative_to(ROOT)}")
    bad = [check.what for check in checks if not check.holds]
    say(f"{len(checks) - len(bad)} of {len(checks)} figures agree" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
