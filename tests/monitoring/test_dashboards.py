"""The dashboards are what their code says, ask only for series that there are, and say what each panel is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from localcluster.prometheus import program
from queries import METRIC, boards, chosen, of_panels, of_rules, selectors
from trireme_api.metrics import METRICS

from dashboards.__main__ import outputs

ROOT = Path(__file__).resolve().parents[2]
RECORDED = re.compile(r"namespace_job\w*:[\w:]+")


@pytest.mark.parametrize("path", outputs(), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path: Path) -> None:
    assert path.read_text() == outputs()[path], "run `make dashboards`"


def test_all_of_them_are_delivered() -> None:
    made = yaml.safe_load((ROOT / "manifests" / "monitoring" / "kustomization.yaml").read_text())["configMapGenerator"]
    assert {file for one in made for file in one["files"]} == {f"dashboards/{path.name}" for path in outputs()}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("name", boards())
def test_panels_do_not_overlap_and_explain_themselves(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(boards()[name]):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_job_board_answers_what_is_asked_at_night() -> None:
    titles = {panel["title"] for panel in panels(boards()["job"])}
    assert {
        "State", "Loss", "Step", "Throughput", "TFLOP/s", "MFU", "Time by state", "Newest recovery", "Restarts left",
        "Not saved", "Power", "CO2e", "Goodput", "Heartbeats",
    } <= titles  # fmt: skip


def test_queries_name_only_what_there_is() -> None:
    recorded = {rule.where for rule in of_rules() if ":" in rule.where}
    known = set(METRICS)
    for name, metric in METRICS.items():
        known |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if metric.kind == "histogram" else set()
    for query in (*of_panels(), *of_rules()):
        for used in selectors(query.text):
            bare = used.partition("{")[0]
            assert not bare or bare in known | recorded, f"{query.where}: {used}"
        by_name = [name for name in METRIC.findall(query.text) if name.endswith("_")]
        assert not by_name or "__name__" in query.text, query.where
        assert set(RECORDED.findall(query.text)) <= recorded, query.where


def test_every_query_is_promql(tmp_path: Path) -> None:
    """promtool reads each as the expression of a recording rule."""
    queries = list(of_panels())
    rules = [{"record": f"panel:{n}", "expr": chosen(query.text, "ns", "job")} for n, query in enumerate(queries)]
    path = tmp_path / "panels.yml"

    def check(rules: list[dict[str, str]]) -> subprocess.CompletedProcess[str]:
        path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        return subprocess.run(
            [program("promtool"), "check", "rules", str(path)], capture_output=True, text=True, check=False
        )

    done = check(rules)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout
    assert check([*rules, {"record": "panel:broken", "expr": "sum by (job (up)"}]).returncode != 0
