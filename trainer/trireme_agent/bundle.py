"""`python -m trireme_agent.bundle OUT.pyz`: the agent and the protocol as one file that any Python from 3.9 on runs.

The same sources give the same bytes, on any machine: fixed order, times and modes, nothing compressed.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import Dict, Optional, Sequence

import trireme_api

import trireme_agent

SHEBANG = b"#!/usr/bin/env python3\n"
MAIN = b"import sys\nfrom trireme_agent.__main__ import main\nsys.exit(main())\n"
API_MODULES = (
    "__init__.py", "energy.py", "heartbeat.py", "metrics.py", "protocol.py", "shards.py", "spent.py", "wire.py"
)
LEFT_OUT = frozenset({"bundle.py"})
EPOCH = (1980, 1, 1, 0, 0, 0)


def contents() -> Dict[str, bytes]:
    """Archive name → bytes."""
    found = {"__main__.py": MAIN}
    for path in sorted(_folder(trireme_agent.__file__).glob("*.py")):
        if path.name not in LEFT_OUT:
            found[f"trireme_agent/{path.name}"] = path.read_bytes()
    for name in API_MODULES:
        found[f"trireme_api/{name}"] = (_folder(trireme_api.__file__) / name).read_bytes()
    return found


def _folder(file: Optional[str]) -> Path:
    assert file is not None
    return Path(file).parent


def build() -> bytes:
    archive = io.BytesIO()
    archive.write(SHEBANG)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_STORED) as target:
        for name, data in sorted(contents().items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            target.writestr(entry, data)
    return archive.getvalue()


def main(arguments: Optional[Sequence[str]] = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m trireme_agent.bundle OUT.pyz", file=sys.stderr)
        return 64
    out = Path(given[0])
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(build())
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except OSError as error:
        print(f"{out}: {error.strerror}", file=sys.stderr)
        return 74
    return 0


if __name__ == "__main__":
    sys.exit(main())
