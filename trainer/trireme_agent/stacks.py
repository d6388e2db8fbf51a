"""What hung ranks were doing: their stacks, taken before anything is killed, saved where they outlive the pod.

In order of what tells most: the rank's own handler (a signal it names in its heartbeat, on which it writes all its
threads' stacks), py-spy where the image has it, else what the kernel says of each thread. Signals are sent by the
caller's thread, which also reaps, so that no number can have become somebody else's; the rest is done by another.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Collection, Dict, List, Mapping, Optional, Tuple

from trireme_api.heartbeat import flight_name, stacks_name
from trireme_api.protocol import PVC_ROOT, Env, RankStack, Stacks, clean_text

from trireme_agent import processes

HANDLER_SECONDS = 3.0
CONTINUE_AFTER = 1.0
"""A stopped rank is continued only when its peers, in other pods too, have had the time to write where they wait for
it: its first steps would set them free."""
PY_SPY_SECONDS = 10.0
MAX_BYTES = 8 * 1024 * 1024
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
STATES = {
    "R": "running", "S": "sleeping", "I": "sleeping", "D": "uninterruptible", "T": "stopped", "t": "traced",
    "Z": "zombie", "X": "gone",
}
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line \d+ in (?P<name>\S+)|^\s+(?P<n2>\S+) \((?P<f2>[^():]+):\d+\)')
_PEERS = re.compile(r"torch/distributed/|torch/autograd/graph\.py")
_DEVICE = frozenset({"synchronize", "item", "tolist", "wait"})
TOP = 4
"""Innermost frames that are looked at: deeper ones only led there."""


@dataclass
class Target:
    local_rank: int
    pid: Optional[int]
    """None: has ended."""
    signal: Optional[int] = None
    """What its heartbeat says it answers with its stacks."""
    state: str = "gone"
    size: int = 0
    """Of its stack file before it was asked."""


def lasting_folder(environment: Mapping[str, str], log_dir: str, attempt: int) -> Tuple[str, str]:
    """(folder, its name for people): beside the checkpoints where they are on a file system, else with the logs."""
    tail = os.path.join("hangs", f"attempt-{attempt}")
    try:
        uri = json.loads(environment.get(Env.CHECKPOINT, "{}")).get("uri", "")
    except (ValueError, AttributeError):
        uri = ""
    if isinstance(uri, str) and uri.startswith("pvc://") and ".." not in uri.split("/"):
        root = environment.get(Env.PVC_ROOT) or PVC_ROOT
        return os.path.join(root, uri[len("pvc://") :], tail), f"{uri.rstrip('/')}/{tail}"
    if isinstance(uri, str) and uri.startswith("/"):
        folder = os.path.join(uri, tail)
        return folder, folder
    folder = os.path.join(log_dir, tail)
    return folder, folder


class Dump:
    """One collection. `result` is set when it is done; a full or read-only disk costs the files, not the summary."""

    def __init__(self, run_dir: str, folder: Tuple[str, str], first_rank: int, targets: List[Target]) -> None:
        self._run_dir = run_dir
        self._folder, self._name = folder
        self._first = first_rank
        self._targets = targets
        self.result: Optional[Stacks] = None
        self.problem = ""
        self._asked: List[Target] = []
        self._continue_at = 0.0

    def start(self) -> None:
        for target in self._targets:
            if target.pid is None:
                continue
            stat = processes.read_stat(target.pid)
            target.state = STATES.get(stat.state, "sleeping") if stat is not None else "gone"
            if target.signal in SIGNALS and stat is not None and stat.state != "Z":
                target.size = _size(self._path(target))
                processes.signal_process(target.pid, target.signal)
                self._asked.append(target)
        self._continue_at = time.monotonic() + CONTINUE_AFTER
        threading.Thread(target=self._collect, name="stacks", daemon=True).start()

    def tick(self, live: Collection[int]) -> None:
        """To be called now and then, with the pids that are not reaped: lets the handlers of stopped ranks run."""
        if not self._asked or time.monotonic() < self._continue_at:
            return
        for target in self._asked:
            stat = processes.read_stat(target.pid) if target.pid is not None and target.pid in live else None
            if stat is not None and stat.state == "T":
                target.state = "stopped"
                processes.signal_process(stat.pid, signal.SIGCONT)
        self._asked = []

    def _path(self, target: Target) -> str:
        return os.path.join(self._run_dir, stacks_name(target.local_rank))

    def _collect(self) -> None:
        until = time.monotonic() + HANDLER_SECONDS
        asked = [target for target in self._targets if target.pid is not None and target.signal in SIGNALS]
        while time.monotonic() < until and not all(_settled(self._path(t), t.size) for t in asked):
            time.sleep(0.05)
        self.result = Stacks(self._name, [self._one(target) for target in self._targets])

    def _one(self, target: Target) -> RankStack:
        how, text = self._stack(target)
        rank = self._first + target.local_rank
        header = f"rank {rank}, pid {target.pid}, process {target.state}, stacks by {how}\n"
        flight = os.path.join(self._run_dir, flight_name(target.local_rank))
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(os.path.join(self._folder, f"rank-{rank}.txt"), "w", encoding="utf-8") as file:
                file.write(header + text)
            if os.path.exists(flight):
                shutil.copyfile(flight, os.path.join(self._folder, f"rank-{rank}.flight.json"))
        except OSError as error:
            self.problem = f"stacks could not be saved at {self._folder}: {error.strerror}"
        waits, where = judge(main_thread(text)) if how in ("faulthandler", "py-spy") else (None, "")
        return RankStack(target.local_rank, target.state, how, waits, where)

    def _stack(self, target: Target) -> Tuple[str, str]:
        path = self._path(target)
        before = _read(path) if _size(path) else ""
        if _size(path) > target.size:
            return "faulthandler", before
        if target.pid is None:
            return "none", "the rank had ended before its stacks could be taken\n"
        spied = _py_spy(target.pid)
        if spied:
            return "py-spy", before + spied
        return "proc", before + kernel_view(target.pid)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _settled(path: str, before: int) -> bool:
    """Grown, and not in the last moment."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return found.st_size > before and time.time() - found.st_mtime > 0.1


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        return f"{path}: {error.strerror}\n"


def _py_spy(pid: int) -> str:
    tool = shutil.which("py-spy")
    if tool is None:
        return ""
    try:
        done = subprocess.run(
            [tool, "dump", "--pid", str(pid)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=PY_SPY_SECONDS, check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")[:MAX_BYTES] if done.returncode == 0 else ""


def kernel_view(pid: int) -> str:
    """State, wait channel and kernel stack (where the kernel lets us) of every thread."""
    lines: List[str] = []
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        return "the process is gone\n"
    for thread in threads:
        facts: Dict[str, str] = {}
        for name in ("comm", "wchan", "syscall", "stack"):
            try:
                with open(f"/proc/{pid}/task/{thread}/{name}", encoding="utf-8", errors="replace") as file:
                    facts[name] = file.read(4096).strip()
            except OSError:
                continue
        stat = processes.read_stat(int(thread))
        state = STATES.get(stat.state, stat.state) if stat is not None else "?"
        lines.append(
            f"thread {thread} {facts.get('comm', '?')}: {state}, waits in {facts.get('wchan') or '?'}, "
            f"system call {facts.get('syscall') or '?'}"
        )
        lines += [f"  {line}" for line in facts.get("stack", "").splitlines()]
    return "\n".join(lines) + "\n"


def main_thread(text: str) -> List[Tuple[str, str]]:
    """(file, function) of the main thread's frames, innermost first. faulthandler writes it last, py-spy names it."""
    blocks: List[Tuple[str, List[Tuple[str, str]]]] = []
    for line in text.splitlines():
        found = _FRAME.match(line)
        if found and blocks:
            blocks[-1][1].append((found["file"] or found["f2"], found["name"] or found["n2"]))
        elif line.startswith(("Thread ", "Current thread ")):
            blocks.append((line, []))
    named = [frames for head, frames in blocks if "MainThread" in head]
    return named[0] if named else blocks[-1][1] if blocks else []


def judge(frames: List[Tuple[str, str]]) -> Tuple[Optional[bool], str]:
    """(whether it waits for its peers, where it is): None where there are no frames."""
    if not frames:
        return None, ""
    where = " < ".join(f"{name} ({os.path.basename(file)})" for file, name in frames[:TOP])
    if any(_PEERS.search(file) for file, _ in frames[:TOP]):
        return True, clean_text(where, 300)
    if frames[0][1] in _DEVICE or any(name in _DEVICE and "torch/cuda" in file for file, name in frames[:TOP]):
        return None, clean_text(where, 300)  # waits for its device, which may wait for its peers
    return False, clean_text(where, 300)
