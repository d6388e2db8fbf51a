from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "cluster"), str(ROOT / "tests" / "apiserver"), str(Path(__file__).parent)]
