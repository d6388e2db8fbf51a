"""`python -m dashboards` writes manifests/monitoring/dashboards/*.json; `--check` says whether they are current."""

from __future__ import annotations

import argparse
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards.carbon import carbon
from dashboards.fleet import fleet
from dashboards.job import job

FOLDER = Path(__file__).resolve().parents[1] / "manifests" / "monitoring" / "dashboards"


def outputs() -> dict[Path, str]:
    """Every file and what must stand in it."""
    boards = {"job": job(), "fleet": fleet(), "carbon": carbon()}
    return {
        FOLDER / f"{name}.json": JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"
        for name, made in boards.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    check = parser.parse_args().check
    stale = {path: text for path, text in outputs().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{path.name} is out of date: run `make dashboards`" if check else f"wrote {path.name}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
