"""Every paper in miniature, one after the other, each with the time it took.

    python benchmarks/papers/all.py                 # what is measured already is not measured again
    python benchmarks/papers/all.py opt moe         # these alone
    python benchmarks/papers/all.py --quick         # does each run? a few steps of each; keeps nothing

A miniature that fails does not keep the others from running; the exit code says that one did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def miniatures() -> dict[str, Path]:
    """Scripts by name."""
    found = {path.parent.name: path for path in sorted(HERE.glob("*/run.py"))}
    return {**found, "alma-language": HERE / "alma" / "language.py"}


def main() -> None:
    known = miniatures()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"left out: all of {', '.join(known)}")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    unknown = set(options.names) - set(known)
    if unknown:
        sys.exit(f"no miniature is called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    took: list[tuple[str, float, int]] = []
    for name in options.names or known:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, str(known[name]), *(["--quick"] if options.quick else [])]
        code = subprocess.run(command, check=False).returncode
        took.append((name, time.perf_counter() - began, code))
    for name, seconds, code in took:
        print(f"{name:<14} {seconds:8.1f} s{'' if code == 0 else f'  failed, exit code {code}'}")
    print(f"{'together':<14} {sum(seconds for _, seconds, _ in took):8.1f} s")
    sys.exit(any(code for _, _, code in took))


if __name__ == "__main__":
    main()
