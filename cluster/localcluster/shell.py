"""Running other programs: one place that turns a failure into one readable line."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from .report import ClusterError

# Debian keeps ip, iptables and debootstrap in sbin, which a plain user's PATH may lack.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def environment(extra: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    """The caller's environment with the system's program folders appended to PATH."""
    env = dict(os.environ)
    env["PATH"] = env.get("PATH", "") + ":" + SYSTEM_PATH
    env.update(extra or {})
    return env


def which(program: str) -> Optional[str]:
    """Full path of a program, the system's sbin folders included."""
    return shutil.which(program, path=environment()["PATH"])


def run(
    argv: Sequence[str],
    *,
    cwd: Optional[Path] = None,
    env: Optional[Dict[str, str]] = None,
    log: Optional[Path] = None,
    stdin: Optional[str] = None,
    timeout: Optional[float] = None,
) -> str:
    """Run to completion and return stdout; with `log`, both streams are appended there instead.

    Raises ClusterError naming the program and the last line it printed.
    """
    try:
        with open(log, "ab") if log is not None else nullcontext(subprocess.PIPE) as sink:
            done = subprocess.run(
                list(argv),
                cwd=cwd,
                env=environment(env),
                stdout=sink,
                stderr=subprocess.STDOUT if log is not None else subprocess.PIPE,
                text=True,
                input=stdin or "",
                timeout=timeout,
                check=False,
            )
    except FileNotFoundError as error:
        raise ClusterError(f"program {argv[0]!r} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{_short(argv)} did not finish within {timeout:.0f} s") from error
    if done.returncode != 0:
        detail = f"see {log}" if log is not None else _last_line(done.stderr or done.stdout)
        raise ClusterError(f"{_short(argv)} failed with exit code {done.returncode}: {detail}")
    return done.stdout or ""


def succeeds(argv: Sequence[str]) -> bool:
    """True when the program exists and exits 0; its output is dropped."""
    try:
        return subprocess.run(list(argv), env=environment(), capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _short(argv: Sequence[str]) -> str:
    words: List[str] = [os.path.basename(argv[0]), *argv[1:]]
    text = " ".join(words)
    return text if len(text) <= 120 else text[:117] + "..."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
