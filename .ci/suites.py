"""Runs the test suites one after the other; prints time and counts of each and one summary line at the end.

Each suite is its own pytest process, so that a crash or a hang in one cannot hide the results of another, and the
counts come from the JUnit file that pytest writes. A suite that runs no test has failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "test-results"


@dataclass
class Outcome:
    suite: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Suite:
    name: str
    what: str
    minutes: int
    """Longest time; a suite that takes longer is stopped and has failed."""


PYTEST_SUITES = (
    Suite("unit", "pure logic, contracts, manifests, house rules", 10),
    Suite("simulation", "reconcile against a model cluster, the agent with real processes", 25),
    Suite("trainer", "torch on the CPU, several ranks", 30),
    Suite("apiserver", "the operator against a real API server", 25),
    Suite("monitoring", "rules, alerts and dashboards against a real Prometheus", 15),
    Suite("e2e", "the real cluster: train, break, recover", 30),
)


def lint() -> Outcome:
    outcome = Outcome("lint")
    began = time.monotonic()
    for command in (("ruff", "check", "."), ("mypy", "--no-error-summary")):
        print(f"$ {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False)
        if done.returncode == 0:
            outcome.passed += 1
        else:
            outcome.failed += 1
    outcome.seconds = time.monotonic() - began
    return outcome


def counts(junit: Path) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a JUnit file; a test that errs in set-up or tear-down has failed."""
    passed = failed = skipped = 0
    for case in ET.parse(junit).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed += 1
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def pytest_suite(suite: Suite, arguments: Sequence[str]) -> Outcome:
    outcome = Outcome(suite.name)
    folder = ROOT / "tests" / suite.name
    if not folder.is_dir() or not list(folder.rglob("test_*.py")):
        return Outcome(suite.name, failed=1, note=f"tests/{suite.name} holds no test")
    RESULTS.mkdir(parents=True, exist_ok=True)
    junit = RESULTS / f"{suite.name}.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "--durations=5", f"--junitxml={junit}", *arguments]
    print(f"$ pytest tests/{suite.name} {' '.join(arguments)}".rstrip(), flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(timeout=suite.minutes * 60)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        code, outcome.note = -1, f"stopped after {suite.minutes} minutes"
    outcome.seconds = time.monotonic() - began
    if junit.exists():
        outcome.passed, outcome.failed, outcome.skipped = counts(junit)
    if code != 0 and outcome.failed == 0:
        outcome.failed = 1
        outcome.note = outcome.note or f"pytest ended with exit code {code}"
    if outcome.passed + outcome.failed == 0:
        outcome.failed, outcome.note = 1, "every test was skipped"
    return outcome


def report(outcomes: Sequence[Outcome]) -> str:
    """The table, then one plain line with the sums."""
    lines = ["", f"{'suite':<12}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for o in outcomes:
        lines.append(f"{o.suite:<12}{o.passed:>8}{o.failed:>8}{o.skipped:>9}{o.seconds:>9.1f}  {o.note}".rstrip())
    total = sum(o.seconds for o in outcomes)
    lines += ["", f"{total / 60:.1f} minutes in all"]
    summary = f"{sum(o.passed for o in outcomes)} passed, {sum(o.failed for o in outcomes)} failed"
    skipped = sum(o.skipped for o in outcomes)
    lines.append(summary + (f", {skipped} skipped" if skipped else ""))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    known: dict[str, Callable[[], Outcome]] = {"lint": lint}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "suites", nargs="*", help="of: lint " + " ".join(s.name for s in PYTEST_SUITES) + " (default: all)"
    )
    parser.add_argument("--pytest", default="", help="further arguments for pytest, e.g. '-k recovery'")
    options = parser.parse_args(argv)
    for suite in PYTEST_SUITES:
        known[suite.name] = lambda suite=suite: pytest_suite(suite, options.pytest.split())  # type: ignore[misc]
    wanted = options.suites or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(known)}")
    # Torch takes every core by default; with several ranks on few cores that is slower than one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes = []
    for name in wanted:
        print(f"\n=== {name}", flush=True)
        outcomes.append(known[name]())
    print(report(outcomes), flush=True)
    return 1 if any(o.failed for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
