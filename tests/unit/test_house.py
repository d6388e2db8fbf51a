"""The rules of the house: who may import whom, how large a file may grow, and that no file knows one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOMES = {
    "trireme_api": ROOT / "api" / "trireme_api",
    "trireme_operator": ROOT / "operator" / "trireme_operator",
    "trireme_agent": ROOT / "trainer" / "trireme_agent",
    "trireme_trainer": ROOT / "trainer" / "trireme_trainer",
    "trireme_cli": ROOT / "cli" / "trireme_cli",
}
# What each part may import of the others (design: operator → api ← trainer, cli → all, nothing → cli).
MAY = {
    "trireme_api": {"trireme_api"},
    "trireme_operator": {"trireme_api", "trireme_operator"},
    "trireme_agent": {"trireme_api.protocol", "trireme_api.heartbeat", "trireme_api.metrics", "trireme_agent"},
    "trireme_trainer": {"trireme_api", "trireme_trainer"},
    "trireme_cli": set(HOMES),
}
HEAVY = {"torch", "kopf", "kubernetes", "aiohttp", "tokenizers", "transformers", "accelerate", "fsspec", "numpy"}
# What each part may not import of the world.
MAY_NOT = {
    "trireme_api": HEAVY,
    "trireme_operator": {"torch", "tokenizers", "transformers", "accelerate", "numpy"},
    "trireme_agent": HEAVY | {"pydantic", "yaml", "click", "rich"},
    "trireme_trainer": {"kopf", "kubernetes", "aiohttp"},
    "trireme_cli": set(),
}
MAX_LINES = 400


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Every imported module as an absolute name; `from a import b` gives `a` and `a.b`, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, module]) if module else ".".join(base)
            yield module, node.lineno
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def package_of(path: Path, home: Path) -> str:
    """Dotted name of the package that holds the file, for relative imports."""
    return ".".join([home.name, *path.relative_to(home).parent.parts])


def python_imports(home: Path) -> Iterator[tuple[Path, str, int]]:
    for path in sorted(home.rglob("*.py")):
        tree = ast.parse(path.read_text(), filename=str(path))
        for name, line in imports(tree, package_of(path, home)):
            yield path, name, line


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def is_ours(name: str) -> bool:
    return name.split(".")[0] in HOMES


@pytest.mark.parametrize("part", HOMES)
def test_arrows(part: str) -> None:
    wrong = []
    for path, name, line in python_imports(HOMES[part]):
        top = name.split(".")[0]
        parent_only = part == "trireme_agent" and name == "trireme_api"  # `from trireme_api import protocol`
        if (is_ours(name) and not within(name, MAY[part]) and not parent_only) or top in MAY_NOT[part]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


# What `decide` may know of the world: nothing that differs between two calls with the same arguments.
IMPURE = {"asyncio", "aiohttp", "kopf", "kubernetes", "logging", "os", "pathlib", "random", "socket", "time"}
OPERATOR = "trireme_operator"


def test_what_the_operator_decides_is_pure() -> None:
    wrong = []
    for path, name, line in python_imports(HOMES[OPERATOR] / "decide"):
        inside = within(name, {f"{OPERATOR}.decide"}) or name == OPERATOR
        if (within(name, {OPERATOR}) and not inside) or name.split(".")[0] in IMPURE:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def standard_library_only(path: Path, home: Path, besides: set[str]) -> list[str]:
    tree = ast.parse(path.read_text())
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for name, line in imports(tree, package_of(path, home))
        if name.split(".")[0] not in sys.stdlib_module_names and not within(name, besides) and name != "trireme_api"
    ]


def test_the_agent_and_the_protocol_need_only_the_standard_library() -> None:
    api = HOMES["trireme_api"]
    wrong = standard_library_only(api / "__init__.py", api, set())
    wrong += standard_library_only(api / "wire.py", api, set())
    wrong += standard_library_only(api / "metrics.py", api, set())
    parts = "energy", "shards", "spent"
    for part in parts:
        wrong += standard_library_only(api / f"{part}.py", api, {"trireme_api.wire"})
    besides = {"trireme_api.wire", *(f"trireme_api.{part}" for part in parts)}
    wrong += standard_library_only(api / "protocol.py", api, besides)
    wrong += standard_library_only(api / "heartbeat.py", api, {"trireme_api.wire", "trireme_api.protocol"})
    for path in sorted(HOMES["trireme_agent"].rglob("*.py")):
        wrong += standard_library_only(path, HOMES["trireme_agent"], MAY["trireme_agent"])
    assert not wrong, "\n".join(wrong)


def test_the_local_cluster_needs_only_the_standard_library() -> None:
    home = ROOT / "cluster"
    own = {path.stem if path.is_file() else path.name for path in home.iterdir()}
    wrong = []
    for path in sorted(home.rglob("*.py")):
        for name, line in imports(ast.parse(path.read_text()), package_of(path, home)):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in own | {"cluster"}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_command_line_starts_without_the_heavy_parts() -> None:
    code = "import sys, trireme_cli.main; print([m for m in ('torch', 'kopf', 'kubernetes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_operator_starts_without_torch() -> None:
    code = "import sys, trireme_operator.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def project_files() -> list[Path]:
    """Every file that belongs to the repository, committed or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_files_stay_small() -> None:
    large = []
    for path in project_files():
        if path.suffix == ".py" and "tests" not in path.relative_to(ROOT).parts:
            lines = len(path.read_text().splitlines())
            if lines > MAX_LINES:
                large.append(f"{path.relative_to(ROOT)} has {lines} lines, more than {MAX_LINES}")
    assert not large, "\n".join(large)


def machine_paths() -> list[str]:
    """Places that are this machine's alone, found out here rather than written down."""
    places = [str(ROOT)]
    places += [
        os.environ[name] for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL") if os.environ.get(name)
    ]
    return [place for place in places if len(place) > 4]


def test_no_file_names_one_machine() -> None:
    someones_home = re.compile(r"(?<![\w.-])/(?:home|Users)/[a-z]\w*")
    places = machine_paths()
    wrong = []
    for path in project_files():
        text = text_of(path)
        if text is None:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            made_up = "tests" in path.relative_to(ROOT).parts  # a test may need somebody's home
            if (someones_home.search(line) and not made_up) or any(place in line for place in places):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_the_arrow_check_sees_what_it_should(tmp_path: Path) -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n"
    found = {name for name, _ in imports(ast.parse(source), "top.sub")}
    assert found == {"a.b", "c", "c.d", "top.sub", "top.sub.e", "top.f", "top.f.g", "i"}
