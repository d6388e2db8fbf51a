"""Why a rank ended: from its own word, exit code, signal, the kernel's OOM count and its last lines.

Lines of a log are the weakest evidence: they refine a crash, they never overrule what the kernel or the rank said.
A line about a lost peer or a collective that timed out is a cascade: some other rank failed first (the rule of NVRx's
pattern registry), so it is marked and loses against any failure that is not.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Pattern, Sequence, Tuple

from trireme_api.protocol import Cause, ExitCode, Failure, cause_of_exit

EXIT_MEANING: Dict[int, str] = {
    ExitCode.BAD_RECIPE: "bad recipe",
    ExitCode.BAD_DATA: "bad data",
    ExitCode.NON_FINITE: "loss not finite",
    ExitCode.HANG: "hang: no step within the limit",
    ExitCode.CHECKPOINT_IO: "checkpoint could not be written or read",
    ExitCode.NOT_EXECUTABLE: "command is not executable",
    ExitCode.NOT_FOUND: "command not found",
}


@dataclass(frozen=True)
class Rule:
    cause: Cause
    pattern: Pattern[str]
    cascade: bool = False
    advice: str = ""


def _rule(cause: Cause, pattern: str, cascade: bool = False, advice: str = "") -> Rule:
    return Rule(cause, re.compile(pattern), cascade, advice)


RULES: Tuple[Rule, ...] = (
    _rule(Cause.INFRASTRUCTURE, r"\bXid\b.*\b(48|63|64|74|79|94|95)\b|fallen off the bus"),
    _rule(Cause.INFRASTRUCTURE, r"[Uu]ncorrectable (ECC|NVLink)"),
    _rule(Cause.INFRASTRUCTURE, r"no CUDA-capable device|CUDA driver version is insufficient|library version mismatch"),
    _rule(Cause.INFRASTRUCTURE, r"No space left on device", advice="free space or use a larger volume"),
    _rule(Cause.INFRASTRUCTURE, r"Stale file handle|\[Errno 5\]|Input/output error"),
    _rule(Cause.OOM, r"\bOutOfMemoryError\b|(CUDA|HIP) out of memory", advice="smaller batch.micro or more sharding"),
    _rule(Cause.OOM, r"^MemoryError\b|DefaultCPUAllocator: can't allocate|Cannot allocate memory"),
    _rule(Cause.NETWORK, r"[Aa]ddress already in use|EADDRINUSE|Name or service not known"),
    _rule(Cause.NETWORK, r"[Cc]onnection (was )?(closed|reset) by|Broken pipe", cascade=True),
    _rule(Cause.NETWORK, r"ncclRemoteError|remote process exited|ncclSystemError|ncclInternalError", cascade=True),
    _rule(Cause.NETWORK, r"[Ww]atchdog caught collective operation timeout|NCCL watchdog", cascade=True),
    _rule(Cause.NETWORK, r"Timed out waiting \d+ms for|Application timeout caused pair closure", cascade=True),
    _rule(Cause.NETWORK, r"Gloo .*(connect|recv|send).*(failed|timed out)", cascade=True),
    _rule(Cause.NETWORK, r"DistNetworkError|DistStoreError|client socket has (timed out|failed)", cascade=True),
    _rule(Cause.USER_ERROR, r"^(ModuleNotFoundError|SyntaxError|IndentationError|TabError)\b"),
    _rule(Cause.USER_ERROR, r"can't open file '|No module named "),
    _rule(Cause.USER_ERROR, r"error: (unrecognized arguments|the following arguments are required|argument .*invalid)"),
)
"""First match wins. A pattern is looked for in the last exception first, then in the last lines, newest first."""

LOOK_BACK = 60
TRACEBACK = "Traceback (most recent call last):"
_HEADER = re.compile(r"^(?P<indent>.*?)Traceback \(most recent call last\):\s*$")
_FINAL = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(: .*)?$")
_COMMUNICATION = re.compile(r"NCCL|[Gg]loo|Dist\w*Error|ProcessGroup")
_FATAL = re.compile(r"^Fatal Python error: |^terminate called after|^\s*what\(\): ")


@dataclass
class Evidence:
    """What is known about one ended rank."""

    rank: int
    exit: int
    """Exit code; negative: signal."""
    tail: List[str] = field(default_factory=list)
    oom_killed: bool = False
    """The kernel's OOM count of this pod rose while the rank ran."""
    told: Optional[Failure] = None
    """What the rank wrote into its heartbeat before it ended on purpose."""
    recorded: Optional[str] = None
    """Traceback from the error file that torch's `@record` writes."""
    pod_stopping: bool = False
    """The pod had been asked to go (SIGTERM) when it happened."""
    at: Optional[float] = None


def classify(evidence: Evidence) -> Optional[Failure]:
    """The failure, or None for an end that is none (0, or 75 saved and stopped)."""
    code = evidence.exit
    if code in (ExitCode.DONE, ExitCode.SAVED_AND_STOPPED):
        return None
    told_traceback = evidence.told.traceback if evidence.told is not None else None
    traceback = last_traceback(evidence.tail) or evidence.recorded or told_traceback
    final = final_line(traceback) if traceback else None
    number = -code if code < 0 else (code - 128 if 128 < code < 160 else None)
    cause, message, cascade = _judge(evidence, number, traceback, final)
    return Failure(
        cause=cause, message=f"rank {evidence.rank}: {message}", rank=evidence.rank, exit=code, traceback=traceback,
        at=evidence.at, cascade=cascade, missing=evidence.told.missing if evidence.told is not None else None,
    )


def _judge(
    evidence: Evidence, number: Optional[int], traceback: Optional[str], final: Optional[str]
) -> Tuple[Cause, str, bool]:
    code = evidence.exit
    meaning = EXIT_MEANING.get(code)
    if evidence.told is not None:
        told = evidence.told
        # A lost connection is what the peers of a failed rank see first.
        return told.cause, _join(f"exit {code}", told.message), told.cascade or told.cause is Cause.NETWORK
    if meaning is not None:
        message = _join(f"exit {code} ({meaning})", final or _last_words(evidence.tail))
        return cause_of_exit(code) or Cause.UNKNOWN, message, False
    if number == signal.SIGKILL and evidence.oom_killed:
        return Cause.OOM, "killed by the kernel: the pod ran out of memory; raise its memory limit", False
    rule, line = match_rules(traceback, evidence.tail)
    if number == signal.SIGKILL:
        # "Killed" alone is not out of memory: the kernel would have counted it.
        return Cause.UNKNOWN, "killed by SIGKILL, not by this agent and not for lack of memory", False
    if number == signal.SIGTERM:
        cause = Cause.PREEMPTION if evidence.pod_stopping else Cause.UNKNOWN
        return cause, "terminated by SIGTERM from outside", False
    how = _signal_name(number) if number is not None else f"exit {code}"
    if rule is not None:
        message = _join(how, line)
        return rule.cause, f"{message} ({rule.advice})" if rule.advice else message, rule.cascade
    if number == signal.SIGBUS:
        advice = "often /dev/shm is too small; mount an emptyDir with medium Memory there"
        return Cause.INFRASTRUCTURE, f"{how}: {advice}", False
    return Cause.UNKNOWN, _join(how, final or _last_words(evidence.tail)), False


def match_rules(traceback: Optional[str], tail: Sequence[str]) -> Tuple[Optional[Rule], str]:
    """The rule that explains the end, with the line it was read from.

    An exception names its own reason, so with one the other lines count only where they come from native code dying,
    or where the exception is a communication library's, which gives its reason in the lines below.
    """
    recent = [line for line in reversed(tail[-LOOK_BACK:]) if line.strip()]
    lines = recent
    if traceback is not None:
        message = _message_lines(traceback)
        communication = bool(message) and bool(_COMMUNICATION.search(message[0]))
        lines = [*(message if communication else message[:1]), *(line for line in recent if _FATAL.search(line))]
    for line in lines:
        for rule in RULES:
            if rule.pattern.search(line):
                return rule, line.strip()[:500]
    return None, ""


def last_traceback(tail: Sequence[str]) -> Optional[str]:
    """The last Python traceback of a log's end: header, frames, exception line and up to 8 lines of its message."""
    start = None
    indent = ""
    for index, line in enumerate(tail):
        found = _HEADER.match(line)
        if found:
            start, indent = index, found.group("indent")
    if start is None:
        return None
    lines = [TRACEBACK]
    after = 0
    for line in tail[start + 1 :]:
        # Loggers and torch prefix every line, e.g. "[rank0]: "; the header told with what.
        text = line[len(indent) :] if indent and line.startswith(indent.rstrip()) else line
        after += 1 if after or _is_final(text) else 0
        if after > 9 or len(lines) > 200:
            break
        lines.append(text.rstrip())
    return "\n".join(lines)


def final_line(traceback: str) -> Optional[str]:
    """`ValueError: …` of a traceback; None when it was cut short."""
    message = _message_lines(traceback)
    return message[0][:500] if message else None


def _message_lines(traceback: str) -> List[str]:
    lines = traceback.splitlines()
    for index, line in enumerate(lines[1:], start=1):
        if _is_final(line):
            return lines[index:]
    return []


def _is_final(line: str) -> bool:
    return bool(line) and not line[0].isspace() and _FINAL.match(line) is not None


def prefer(first: Optional[Failure], second: Optional[Failure]) -> Optional[Failure]:
    """The more likely root of two failures on one pod: never a cascade when there is another; else the earlier."""
    if first is None or second is None:
        return first or second
    if first.cascade and not second.cascade:
        return second
    return first


def shell_code(code: int) -> int:
    """A process's exit code as a shell gives it: signals become 128 + number."""
    return 128 - code if code < 0 else code


def _signal_name(number: int) -> str:
    try:
        return f"died of {signal.Signals(number).name}"
    except ValueError:
        return f"died of signal {number}"


def _last_words(tail: Sequence[str]) -> str:
    for line in reversed(tail):
        if line.strip():
            return line.strip()[:300]
    return "no output"


def _join(how: str, what: str) -> str:
    return f"{how}: {what}" if what else how
