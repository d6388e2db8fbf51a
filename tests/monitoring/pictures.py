"""`make dashboard-pictures`: a job trains here and loses two ranks; its dashboards go to docs/images."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "cluster"), str(ROOT / "tests" / "apiserver"), str(Path(__file__).parent)]

from world import JOB, NAMESPACE, running  # noqa: E402

from dashboards.render import pictures  # noqa: E402

MINUTES = float(sys.argv[1]) if len(sys.argv) > 1 else 6.0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), every=50) as there:
        for share, pod in ((0.4, f"{JOB}-1-1"), (0.75, f"{JOB}-0-1")):
            time.sleep(max(0.0, there.began + 60 * MINUTES * share - time.time()))
            there.kill_rank(pod)
        time.sleep(max(0.0, there.began + 60 * MINUTES - time.time()))
        pictures(there.prometheus.url, NAMESPACE, JOB, MINUTES)


if __name__ == "__main__":
    main()
