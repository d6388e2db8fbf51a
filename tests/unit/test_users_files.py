"""Files that are not what a command takes: it ends with one line that names the file, and with no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_corpus import numbered, write_corpus
from trireme_cli import documents
from trireme_cli.main import main

JOB = "apiVersion: trireme.dev/v1alpha1\nkind: TrainingJob\nmetadata: {name: a}\n"
RECIPE = "model: {preset: opt-8m}\ndata: {sources: [{path: x}], sequenceLength: 8}\nbatch: {tokens: 8}\n"
FILES: dict[str, tuple[bytes, str]] = {
    "broken": (b"a: [", "YAML: line 1, column 5: while parsing a flow node"),
    "torn text": (b'model: "', "YAML: line 1, column 9: while scanning a quoted scalar"),
    "binary": (b"a: \xff", "YAML: byte 3 is not UTF-8 text; save the file as UTF-8"),
    "control characters": (b"a: \x01", "YAML: unacceptable character"),
    "nothing": (b"", "recipe"),
    "empty documents": (b"---\n---\n", "recipe"),
    "a list": (b"- 1\n", "list"),
    "a text": (b"hello\n", "str"),
    "another kind": (b"kind: Pod\n", "recipe"),
    "a list of another kind": (b"kind: PodList\nitems: 3\n", "recipe"),
    "no spec": (JOB.encode(), "spec: is required and must be an object"),
    "spec that is none": ((JOB + "spec: 4\n").encode(), "spec: is required and must be an object"),
    "empty spec": ((JOB + "spec: {}\n").encode(), "spec: give a recipe, or your own script"),
    "half a recipe": (RECIPE.encode(), "until: is required"),
    "a wrong name": ((RECIPE + "untill: {steps: 1}\n").encode(), "untill: unknown field; did you mean 'until'?"),
}


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_with_a_file_is_said_in_a_line(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, words = FILES[name]
    Path("it.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main([command, "it.yaml"])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 64
    assert "it.yaml" in said
    assert words in said
    assert command == "validate" or "\n" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.yaml"], "nothing was begun"


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize("file", ["absent.yaml", "."])
def test_a_file_that_is_none(command: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, str(tmp_path / file)])
    assert ended.value.code == 64
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("option", "field"), [("--checkpoint", "checkpoint.uri"), ("data", "data.sources[0].path")])
def test_a_url_that_nothing_here_reads(
    option: str, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "x", numbered([1000]), vocabulary=1000)
    recipe = f"{RECIPE}until: {{steps: 1}}\n".replace("path: x", "path: nosuch://x" if option == "data" else "path: x")
    Path("it.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as ended:
        main(["run", "it.yaml", *([option, "nosuch://x"] if option != "data" else [])])
    assert ended.value.code == 64
    assert f"error: {field}: nosuch://x: no scheme is called 'nosuch'" in capsys.readouterr().err
    assert not Path("trireme-run").exists()


@pytest.mark.parametrize(
    "words",
    ["plan it.yaml --tflops", "plan it.yaml --storage", "run it.yaml --grace", "top --interval", "report x --pue"],
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none(
    words: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("it.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), value])
    said = capsys.readouterr().err
    assert ended.value.code == 64
    assert words.split()[-1] in said
    assert f"{value} is not a finite number" in said


def test_of_many_documents_the_job_is_taken_and_two_are_too_many(tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    file.write_text(f"kind: ConfigMap\n---\n{RECIPE}---\n{JOB}")
    assert documents.the_one(file)["metadata"] == {"name": "a"}
    file.write_text(f"{JOB}---\n{JOB}")
    with pytest.raises(ValueError, match=r"it\.yaml: holds 2 TrainingJobs; give a file with one"):
        documents.the_one(file)


def test_what_kubectl_prints_of_several_jobs_is_read_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    listed = "".join(f"- {JOB.strip()}".replace("\n", "\n  ") + "\n" for _ in range(2))
    file.write_text(f"apiVersion: v1\nkind: List\nitems:\n{listed}")
    assert [documents.is_job(one) for one in documents.read(file)] == [True, True]


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n", b"hello\n", b"", b"\xff\xfe", b"kind: Config\n", b"users: 3\n"])
def test_a_kubeconfig_that_is_none(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config").write_bytes(content)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(SystemExit) as ended:
        main(["top"])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("error: no way to a cluster: ")
    assert said.count("\n") == 1
