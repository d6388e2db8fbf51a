"""Every paper in miniature, one after the other, each with the time it took.

    python benchmarks/papers/all.py                 # what is measured already is not measured again
    python benchmarks/papers/all.py opt moe         # these alone

A miniature that fails does not keep the others from running; the exit code says that one did.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHEAPEST_FIRST = ["moe", "opt", "alma", "fsdp", "normformer", "tam"]
"""Others follow in the order of their names."""


def miniatures() -> list[str]:
    found = sorted(path.parent.name for path in HERE.glob("*/run.py"))
    return sorted(found, key=lambda name: CHEAPEST_FIRST.index(name) if name in CHEAPEST_FIRST else len(found))


def main() -> None:
    known = miniatures()
    asked = sys.argv[1:] or known
    unknown = set(asked) - set(known)
    if unknown:
        sys.exit(f"no miniature is called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    took: list[tuple[str, float, int]] = []
    for name in asked:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, str(HERE / name / "run.py")], check=False).returncode
        took.append((name, time.perf_counter() - began, code))
    for name, seconds, code in took:
        print(f"{name:<14} {seconds:8.1f} s{'' if code == 0 else f'  failed, exit code {code}'}")
    sys.exit(any(code for _, _, code in took))


if __name__ == "__main__":
    main()
