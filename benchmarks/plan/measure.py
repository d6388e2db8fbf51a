"""Peak memory of a training step, counted, beside what `trireme plan` says of it.

python benchmarks/plan/measure.py --output plan-memory.json

Every case is one rank's process on this machine, whatever number of ranks it plays; three minutes in all.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("api", "trainer", "benchmarks/plan")]

import torch  # noqa: E402
from plan_cases import cases  # noqa: E402
from plan_live import peak  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    rows, begin = [], time.perf_counter()
    for one in cases():
        if options.only not in one.name:
            continue
        moment = one.setting.memory()
        measured = peak(one.setting)
        error = moment.total / measured - 1
        print(f"{error:+7.1%}  {measured / 1e6:8.2f} MB  {one.name}: {moment.when}", flush=True)
        rows.append({"name": one.name, "measured": measured, "predicted": round(moment.total), "when": moment.when})
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    print(f"{len(rows)} cases, off by {sum(errors) / len(errors):.1%} on average and {max(errors):.1%} at most")
    if options.output:
        content = {
            "machine": platform.machine(), "torch": torch.__version__, "seconds": round(time.perf_counter() - begin, 1),
            "cases": rows,
        }  # fmt: skip
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
