"""Every command and every file the documentation names is there: what cannot be found here would fail a reader too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from trireme_api.crd import crd
from trireme_api.job import parse_spec
from trireme_api.recipe import Recipe
from trireme_cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]  # fmt: skip
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")
INLINE = re.compile(r"`((?:trireme|make) [^`\n]+)`")
FOLDERS = "api|benchmarks|cli|cluster|dashboards|demo|docs|images|manifests|operator|tests|trainer"
PATH = re.compile(rf"(?<![\w/.~<>-])(?:{FOLDERS})/[\w./*-]*[\w*]")


def _commands(page: Path) -> list[str]:
    text = page.read_text()
    found = [
        line.split("#")[0].strip()
        for language, body in FENCE.findall(text)
        if language in ("sh", "bash", "console")
        for line in body.replace("\\\n", " ").splitlines()
    ]
    return [command.removeprefix("$ ") for command in [*found, *INLINE.findall(FENCE.sub("", text))] if command]


COMMANDS = sorted({(str(page.relative_to(ROOT)), command) for page in PAGES for command in _commands(page)})


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-zA-Z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("make ")])
def test_make_targets_exist(page: str, command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if "=" not in word and not word.startswith("-")]
    unknown = set(words) - _make_targets()
    assert not unknown, f"{page}: {command}"


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("trireme ")])
def test_trireme_commands_and_options_exist(page: str, command: str) -> None:
    words = [word for word in shlex.split(command.replace("[", "").replace("]", ""))[1:] if word not in ("|", "…")]
    group: click.Command = cli
    context = click.Context(cli)
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        for name in words.pop(0).split("|"):
            found = group.get_command(context, name)
            assert found is not None, f"{page}: {command}: no command {name}"
        group = found
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known.add("--help")
    own = words[: words.index("--")] if "--" in words else words
    options = {word.split("=")[0] for word in own if word.startswith("-")}
    assert options <= known, f"{page}: {command}: unknown {sorted(options - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_manifests_in_the_text_are_valid(page: Path) -> None:
    for language, body in FENCE.findall(page.read_text()):
        if language != "yaml":
            continue
        document = yaml.safe_load(body)
        if isinstance(document, dict) and document.get("kind") == "TrainingJob":
            parse_spec(document["spec"])
        elif isinstance(document, dict) and "model" in document:
            Recipe.model_validate(document)


def named_paths(text: str) -> set[str]:
    """What reads like a path of the repository, in prose or in commands; NAME stands for any."""
    return {path.replace("NAME", "*") for path in PATH.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    paths = named_paths(page.read_text())
    missing = [path for path in sorted(paths) if not any(any(at.glob(path)) for at in (ROOT, page.parent))]
    assert not missing


def test_paths_are_found_where_they_are_named() -> None:
    text = "`tests/unit/no.py` and [x](docs/y.md), cli/NAME.py; not https://a.b/docs/z, /tmp/demo/a or my-tests/b"
    assert named_paths(text) == {"tests/unit/no.py", "docs/y.md", "cli/*.py"}


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if re.match(r"python3? [\w/]+\.py ", c[1])])
def test_scripts_have_the_options(page: str, command: str) -> None:
    """Also those that only the modules beside a script know."""
    script, *words = shlex.split(command)[1:]
    code = "".join(path.read_text() for path in (ROOT / script).parent.rglob("*.py"))
    options = [word for word in words if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in code] == [], f"{page}: {command}"


SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
SPEC = SCHEMA["spec"]["properties"]
BEGINNINGS = {**SPEC["recipe"]["properties"], **SPEC, "spec": SCHEMA["spec"], "status": SCHEMA["status"]}
"""What the path of a field may begin with, as pages write it, and the schema from there on."""
NO_FIELDS = {"model.blocks"}
"""Of a torch module."""


def unknown_fields(text: str) -> list[str]:
    """What in backticks reads like the path of a field and is none."""
    names = set(re.findall(r"`([a-z]\w*(?:\.\w+|\[\w*\])+)`", FENCE.sub("", text))) - NO_FIELDS
    paths = {name: re.sub(r"\[\w*\]", "", name).split(".") for name in names}
    known = {name: path for name, path in paths.items() if path[0] in BEGINNINGS}
    return sorted(name for name, (first, *rest) in known.items() if not _has(BEGINNINGS[first], rest))


def _has(schema: dict[str, Any], path: list[str]) -> bool:
    while "items" in schema:
        schema = schema["items"]
    if not path or schema.get("x-kubernetes-preserve-unknown-fields"):
        return True
    below = schema.get("properties", {}).get(path[0]) or schema.get("additionalProperties")
    return isinstance(below, dict) and _has(below, path[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_fields_exist(page: Path) -> None:
    assert unknown_fields(page.read_text()) == []


def test_a_field_that_is_none_is_seen() -> None:
    text = "`spec.runPolicy.suspend`, `status.slots[].index`, `data.sources[0].path`, `data.sources[0].paths`, `a.b`, "
    text += "`status.goodput.seconds.step`, `checkpoint.every`, `spec.recipe.model.preset`, `spec.recipe.model.presets`"
    assert unknown_fields(text) == ["checkpoint.every", "data.sources[0].paths", "spec.recipe.model.presets"]
