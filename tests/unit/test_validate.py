"""`trireme validate` names file, field and remedy, and finds every problem at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from trireme_cli.validate import validate

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
RECIPE = """
model: {preset: opt-8m}
data: {sources: [{path: /data}], sequenceLength: 128}
batch: {tokens: 1024}
until: {steps: 3}
"""
JOB = """
apiVersion: trireme.dev/v1alpha1
kind: TrainingJob
metadata: {name: good}
spec:
  recipe:
    model: {preset: PRESET}
    data: {sources: [{path: pvc://corpus/en}], sequenceLength: 128}
    batch: {tokens: 1024}
    until: {steps: 3}
  replicas: {desired: REPLICAS}
  checkpoint: {uri: pvc://checkpoints/good}
"""


def check(tmp_path: Path, text: str, *options: str) -> Result:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return CliRunner().invoke(validate, [str(file), *options], standalone_mode=False)


def test_a_good_job_and_a_good_recipe(tmp_path: Path) -> None:
    job = JOB.replace("PRESET", "opt-8m").replace("REPLICAS", "2")
    result = check(tmp_path, f"{job}---\n{RECIPE}---\nkind: ConfigMap\n")
    assert result.return_value == 0
    assert "TrainingJob good: valid" in result.output
    assert "recipe job: valid" in result.output


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        (JOB.replace("PRESET", "opt-8mm").replace("REPLICAS", "2"), "spec.recipe.model.preset", "opt-8m"),
        (JOB.replace("PRESET", "opt-8m").replace("REPLICAS", "-1"), "spec.replicas.desired", "greater than"),
        (JOB.replace("PRESET", "opt-8m").replace("REPLICAS", "2").replace("batch:", "bach:"), "recipe.bach", "'batch'"),
        (JOB.replace("PRESET", "opt-8m").replace("REPLICAS", "2").replace("pvc://c", "/c"), "checkpoint.uri", "pvc://"),
        (RECIPE.replace("1024", "1000"), "", "multiple of data.sequenceLength"),
        (RECIPE.replace("opt-8m", "gpt-5"), "model.preset", "gpt-5"),
        ("a: [", "YAML", "expected"),
        ("- 1", "document", "list"),
        ("kind: ConfigMap", "", "no TrainingJob"),
    ],
)
def test_problems_name_the_field(tmp_path: Path, text: str, field: str, hint: str) -> None:
    result = check(tmp_path, text)
    assert result.return_value == 64
    lines = [line for line in result.output.splitlines() if field in line and hint in line]
    assert lines, result.output


def test_all_problems_at_once_and_as_json(tmp_path: Path) -> None:
    job = JOB.replace("PRESET", "nope").replace("REPLICAS", "0")
    data = json.loads(check(tmp_path, job, "--json").output)
    assert data[0]["valid"] is False
    assert [item["field"] for item in data[0]["problems"]] == ["spec.replicas.desired"]  # shape first, then meaning


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_sample_is_valid(sample: Path) -> None:
    if sample.name == "kustomization.yaml":
        return
    result = CliRunner().invoke(validate, [str(sample)], standalone_mode=False)
    assert result.return_value == 0, result.output
