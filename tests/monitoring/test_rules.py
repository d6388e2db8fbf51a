"""Every alert fires when it should and not when it should not, told by promtool on made-up series."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from localcluster.prometheus import program
from trireme_api.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "manifests" / "monitoring"
JOB = {"namespace": "ns", "job": "j"}


def groups() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
    return found


ALERTS = {rule["alert"]: rule for group in groups()["groups"] for rule in group["rules"] if "alert" in rule}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yml"
    path.write_text(yaml.safe_dump(groups()))
    return path


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *arguments], input=text, capture_output=True, text=True, check=False)


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    """Values by the minute, in promtool's notation: 0+10x90 is 0, 10, … 900."""
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{inner}}}", "values": values}


def job(name: str, values: str, **labels: str) -> dict[str, str]:
    return series(f"trireme_job_{name}", values, **JOB, **labels)


@dataclass(frozen=True)
class Case:
    alert: str
    what: str
    fires: bool
    series: tuple[dict[str, str], ...]
    labels: dict[str, str]
    minutes: int = 90


def case(alert: str, what: str, fires: bool, *given: dict[str, str], minutes: int = 90, **labels: str) -> Case:
    return Case(alert, what, fires, given, labels or JOB, minutes)


RUNS = job("phase", "1x200", phase="Running")
SAVES = job("info", "1x200", uid="u", model="m", checkpoint="pvc", zone="SE")
SCRIPT = job("info", "1x200", uid="u", model="", checkpoint="", zone="SE")
STARTS = job("attempt_start_timestamp_seconds", "0x200")
OLD = job("start_timestamp_seconds", "0x200")
LEFT = {"cause": "network", "action": "RestartProcess"}
OTHER = {"cause": "network", "action": "ReplacePod"}
NONE_MISSING = series("trireme_cpu_energy_joules_total", "0+60x200", **JOB, pod="p", source="declared")
POD = {**JOB, "pod": "p"}
NANS = " ".join(["NaN"] * 95)

CASES = (
    case("TriremeJobStuck", "recovering for 20 minutes", True, job("phase", "1x200", phase="Recovering"),
         minutes=20, **JOB, phase="Recovering"),
    case("TriremeJobStuck", "recovering for 10 minutes", False, job("phase", "1x200", phase="Recovering"), minutes=10),
    case("TriremeJobStuck", "waits for room", False, job("phase", "1x200", phase="Pending")),
    case("TriremeNoProgress", "no step for 30 minutes", True, RUNS, job("step", "0+1x50 50x100")),
    case("TriremeNoProgress", "steps", False, RUNS, job("step", "0+1x200")),
    case("TriremeNoProgress", "has only just begun to run again", False, job("step", "50x200"),
         job("phase", "1x20 0x55 1x100", phase="Running")),
    case("TriremeHang", "one 5 minutes ago", True, job("failures_total", "0x84 1x100", cause="hang")),
    case("TriremeHang", "being answered", True, job("hang", "0x89 1x10")),
    case("TriremeHang", "one an hour ago", False, job("failures_total", "0x30 1x100", cause="hang"),
         job("hang", "0x100")),
    case("TriremeHang", "another cause", False, job("failures_total", "0x84 1x100", cause="oom")),
    case("TriremeRestartBudgetLow", "2 of 8", True, job("restart_budget", "8x200", **LEFT),
         job("restart_budget_left", "2x200", **LEFT), **JOB, cause="network"),
    case("TriremeRestartBudgetLow", "2 of 3 on one rung, all on another", False, job("restart_budget", "3x200", **LEFT),
         job("restart_budget_left", "2x200", **LEFT), job("restart_budget", "5x200", **OTHER),
         job("restart_budget_left", "5x200", **OTHER), **JOB, cause="network"),
    case("TriremeGoodputLow", "half is lost", True, OLD, job("seconds_total", "0+30x200", state="step"),
         job("seconds_total", "0+30x200", state="lost"), minutes=150),
    case("TriremeGoodputLow", "a tenth waits for data", False, OLD, job("seconds_total", "0+54x200", state="step"),
         job("seconds_total", "0+6x200", state="data-wait"), minutes=150),
    case("TriremeGoodputLow", "queued for hours: it has no nodes to waste", False, OLD,
         job("seconds_total", "0x200", state="step"), job("seconds_total", "0+60x200", state="queued"), minutes=150),
    case("TriremeGoodputLow", "in its first hour", False, OLD, job("seconds_total", "0+30x200", state="step"),
         job("seconds_total", "0+30x200", state="init"), minutes=50),
    case("TriremeCheckpointTooOld", "none for 90 minutes", True, RUNS, SAVES, STARTS),
    case("TriremeCheckpointTooOld", "saved half an hour ago", False, RUNS, SAVES, STARTS,
         job("last_checkpoint_timestamp_seconds", "3600x200")),
    case("TriremeCheckpointTooOld", "saved long ago, started anew from it just now", False, RUNS, SAVES,
         job("attempt_start_timestamp_seconds", "0x60 4500x100"), job("last_checkpoint_timestamp_seconds", "60x200")),
    case("TriremeCheckpointTooOld", "a script that saves nothing by us", False, RUNS, SCRIPT, STARTS),
    case("TriremeCheckpointTooOld", "suspended", False, job("phase", "0x200", phase="Running"), SAVES, STARTS),
    case("TriremeMFUDrop", "three quarters of what it was", True, job("model_tflops", "100x120 75x60"), minutes=150),
    case("TriremeMFUDrop", "nine tenths", False, job("model_tflops", "100x120 90x60"), minutes=150),
    case("TriremeEnergyMissing", "a GPU without a counter", True,
         series("trireme_gpu_energy_joules_total", NANS, **POD, source="missing"), NONE_MISSING),
    case("TriremeEnergyMissing", "memory has none on most machines", False,
         series("trireme_dram_energy_joules_total", NANS, **POD, source="missing"), NONE_MISSING),
    case("TriremeCarbonBudget", "95 of 100 g", True, job("carbon_budget_grams", "100x200"),
         job("carbon_grams", "60x200", scope="operational"), job("carbon_grams", "35x200", scope="embodied")),
    case("TriremeCarbonBudget", "60 of 100 g", False, job("carbon_budget_grams", "100x200"),
         job("carbon_grams", "60x200", scope="operational")),
    case("TriremeCarbonBudget", "no budget", False, job("carbon_grams", "60x200", scope="operational")),
    case("TriremeOperatorNotLeading", "nobody is scraped", True, RUNS, none=""),
    case("TriremeOperatorNotLeading", "two wait", True, series("trireme_leader", "0x200", pod="a"),
         series("trireme_leader", "0x200", pod="b"), none=""),
    case("TriremeOperatorNotLeading", "two lead", True, series("trireme_leader", "1x200", pod="a"),
         series("trireme_leader", "1x200", pod="b"), none=""),
    case("TriremeOperatorNotLeading", "one leads, one waits", False, series("trireme_leader", "1x200", pod="a"),
         series("trireme_leader", "0x200", pod="b"), none=""),
    case("TriremeOperatorNotLeading", "a change of leader takes a minute", False,
         series("trireme_leader", "1x88 0 1x100", pod="a"), none=""),
    case("TriremeWatchSilent", "lists find news", True,
         series("trireme_watch_unannounced_lists", "2x200", resource="pods"),
         series("trireme_watch_last_event_age_seconds", "0+60x200", resource="pods"), resource="pods"),
    case("TriremeWatchSilent", "quiet because nothing happens", False,
         series("trireme_watch_unannounced_lists", "0x200", resource="pods"),
         series("trireme_watch_last_event_age_seconds", "0+60x200", resource="pods"), resource="pods"),
    case("TriremeQueueLate", "two minutes late", True,
         series("trireme_queue_oldest_seconds", "120x200", pod="a"), none=""),
    case("TriremeQueueLate", "late for a moment", False,
         series("trireme_queue_oldest_seconds", "0x88 120x1 0x100", pod="a"), none=""),
)  # fmt: skip


def firing(one: Case) -> dict[str, Any]:
    """A promtool test: is the alert firing at the end?"""
    labels = {"severity": ALERTS[one.alert]["labels"]["severity"], **{k: v for k, v in one.labels.items() if v}}
    sample = ",".join(f'{key}="{value}"' for key, value in labels.items())
    selector = f'ALERTS{{alertname="{one.alert}",alertstate="firing"'
    return {
        "name": one.what, "interval": "1m",
        "input_series": list(one.series),
        "promql_expr_test": [{
            "expr": selector + "}", "eval_time": f"{one.minutes}m",
            "exp_samples": [{"labels": f"{selector},{sample}}}", "value": 1}] if one.fires else [],
        }],
    }  # fmt: skip


def run(folder: Path, rules: Path, tests: Iterable[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    path = folder / "tests.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "30s", "tests": list(tests)}))
    return promtool("test", "rules", str(path))


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_when_it_should_and_only_then(alert: str, rules: Path, tmp_path: Path) -> None:
    cases = [one for one in CASES if one.alert == alert]
    assert {one.fires for one in cases} == {True, False}
    done = run(tmp_path, rules, map(firing, cases))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_expectation_is_noticed(rules: Path, tmp_path: Path) -> None:
    quiet = next(one for one in CASES if not one.fires)
    done = run(tmp_path, rules, [firing(Case(quiet.alert, "", True, quiet.series, quiet.labels, quiet.minutes))])
    assert done.returncode != 0


def test_words_of_an_alert(rules: Path, tmp_path: Path) -> None:
    budget = next(one for one in CASES if one.what == "2 of 8")
    test = firing(budget) | {"alert_rule_test": [{
        "eval_time": "90m", "alertname": budget.alert, "exp_alerts": [{
            "exp_labels": {**budget.labels, "severity": "critical"},
            "exp_annotations": ALERTS[budget.alert]["annotations"]
            | {"summary": "ns/j has 25% of its restarts for network left"},
        }],
    }]}  # fmt: skip
    done = run(tmp_path, rules, [test])
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong(rules: Path) -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(rules))
    assert done.returncode == 0, done.stdout + done.stderr


def test_metric_names_please_promtool() -> None:
    lines = []
    for metric in METRICS.values():
        kind = metric.kind
        suffix = "_count" if kind == "histogram" else ""
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {kind}", f"{metric.name}{suffix} 1"]
        if kind == "histogram":
            lines += [f"{metric.name}_sum 1", f'{metric.name}_bucket{{le="+Inf"}} 1']
    done = promtool("check", "metrics", text="\n".join(lines) + "\n")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert promtool("check", "metrics", text="# TYPE a_total gauge\na_total 1\n").returncode != 0


def test_every_alert_leads_to_its_page() -> None:
    headings = {line[3:] for line in (ROOT / "docs" / "runbook.md").read_text().splitlines() if line.startswith("## ")}
    assert set(ALERTS) <= headings
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"].endswith(f"/runbook#{name.lower()}")
