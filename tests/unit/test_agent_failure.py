"""Classification: exit codes, signals, the kernel's OOM count, tracebacks and log lines, cascades."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from trireme_agent.cgroup import oom_kills
from trireme_agent.failure import Evidence, classify, final_line, last_traceback, prefer, shell_code
from trireme_api.protocol import Cause, Failure

TRACE = [
    "some line",
    "Traceback (most recent call last):",
    '  File "train.py", line 3, in <module>',
    "    step()",
]


def raised(*message: str) -> list[str]:
    return [*TRACE, *message]


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (64, Cause.USER_ERROR),
        (65, Cause.DATA),
        (70, Cause.NON_FINITE),
        (71, Cause.HANG),
        (74, Cause.INFRASTRUCTURE),
        (126, Cause.USER_ERROR),
        (127, Cause.USER_ERROR),
        (1, Cause.UNKNOWN),
        (17, Cause.UNKNOWN),
        (-signal.SIGSEGV, Cause.UNKNOWN),
        (128 + signal.SIGSEGV, Cause.UNKNOWN),
        (-signal.SIGKILL, Cause.UNKNOWN),
        (137, Cause.UNKNOWN),
        (-signal.SIGTERM, Cause.UNKNOWN),
        (-signal.SIGBUS, Cause.INFRASTRUCTURE),
    ],
)
def test_what_the_code_alone_tells(code: int, cause: Cause) -> None:
    failure = classify(Evidence(rank=3, exit=code))
    assert failure is not None
    assert (failure.cause, failure.rank, failure.exit, failure.cascade) == (cause, 3, code, False)
    assert failure.message.startswith("rank 3: ")


@pytest.mark.parametrize("code", [0, 75])
def test_done_and_saved_are_no_failures(code: int) -> None:
    assert classify(Evidence(rank=0, exit=code, tail=raised("ValueError: printed, but survived"))) is None


@pytest.mark.parametrize("code", [-9, 137])
def test_sigkill_is_oom_only_with_the_kernels_word(code: int) -> None:
    words = ["Killed", "CUDA out of memory"]
    without = classify(Evidence(rank=0, exit=code, tail=words))
    with_word = classify(Evidence(rank=0, exit=code, tail=words, oom_killed=True))
    assert without is not None
    assert without.cause is Cause.UNKNOWN
    assert with_word is not None
    assert with_word.cause is Cause.OOM
    assert "memory limit" in with_word.message


def test_an_oom_elsewhere_in_the_pod_does_not_explain_another_exit() -> None:
    failure = classify(Evidence(rank=0, exit=1, tail=raised("ValueError: x"), oom_killed=True))
    assert failure is not None
    assert failure.cause is Cause.UNKNOWN


def test_sigterm_while_the_pod_goes_is_preemption() -> None:
    failure = classify(Evidence(rank=0, exit=-15, pod_stopping=True))
    assert failure is not None
    assert failure.cause is Cause.PREEMPTION


NCCL = "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"


@pytest.mark.parametrize(
    ("lines", "cause", "cascade"),
    [
        (raised("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"), Cause.OOM, False),
        (raised("MemoryError"), Cause.OOM, False),
        (raised("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"), Cause.OOM, False),
        (raised("ModuleNotFoundError: No module named 'flash_attn'"), Cause.USER_ERROR, False),
        (raised("SyntaxError: invalid syntax"), Cause.USER_ERROR, False),
        (["python3: can't open file '/x.py': [Errno 2] No such file or directory"], Cause.USER_ERROR, False),
        (["usage: a.py [-h]", "a.py: error: unrecognized arguments: --wrong"], Cause.USER_ERROR, False),
        (raised("OSError: [Errno 28] No space left on device"), Cause.INFRASTRUCTURE, False),
        (raised("RuntimeError: CUDA error: uncorrectable ECC error encountered"), Cause.INFRASTRUCTURE, False),
        (raised("RuntimeError: No CUDA GPUs are available: no CUDA-capable device"), Cause.INFRASTRUCTURE, False),
        (["NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."], Cause.INFRASTRUCTURE, False),
        (raised("RuntimeError: [/pair.cc:547] Connection closed by peer [10.0.0.2]:4711"), Cause.NETWORK, True),
        (raised("RuntimeError: [/pair.cc:553] Connection reset by peer"), Cause.NETWORK, True),
        (raised("RuntimeError: [../gloo/tcp/buffer.cc] Timed out waiting 120000ms for recv"), Cause.NETWORK, True),
        (raised(NCCL), Cause.NETWORK, True),
        (
            raised("torch.distributed.DistBackendError: NCCL error", "ncclRemoteError: A call failed possibly"),
            Cause.NETWORK,
            True,
        ),
        (
            [
                "[rank1]:[E] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)",
                "terminate called after throwing an instance of 'c10::DistBackendError'",
                "  what():  [Rank 1] NCCL watchdog thread terminated with exception",
            ],
            Cause.NETWORK,
            True,
        ),
        (
            raised("torch.distributed.DistNetworkError: The server socket failed: Address already in use"),
            Cause.NETWORK,
            False,
        ),
        (raised("torch.distributed.DistStoreError: Timed out after 61 seconds"), Cause.NETWORK, True),
        (raised("ValueError: bad shape"), Cause.UNKNOWN, False),
        (["nothing of use"], Cause.UNKNOWN, False),
        ([], Cause.UNKNOWN, False),
    ],
)
def test_log_lines_refine_a_crash(lines: list[str], cause: Cause, cascade: bool) -> None:
    aborted = any("terminate called" in line for line in lines)
    failure = classify(Evidence(rank=1, exit=-6 if aborted else 1, tail=lines))
    assert failure is not None
    assert (failure.cause, failure.cascade) == (cause, cascade)


@pytest.mark.parametrize(
    "lines",
    [
        ["WARNING: if you see 'Connection reset by peer', check the network", *raised("ValueError: mine")],
        [*raised("ValueError: mine"), "[W] TCPStore: Connection closed by remote", "Broken pipe"],
        ["hint: CUDA out of memory can be avoided by expandable_segments", *raised("ValueError: mine")],
    ],
)
def test_advice_and_noise_beside_an_exception_are_no_evidence(lines: list[str]) -> None:
    failure = classify(Evidence(rank=0, exit=1, tail=lines))
    assert failure is not None
    assert (failure.cause, failure.cascade) == (Cause.UNKNOWN, False)
    assert failure.message == "rank 0: exit 1: ValueError: mine"


def test_logs_never_overrule_the_exit_code() -> None:
    failure = classify(Evidence(rank=0, exit=71, tail=raised("RuntimeError: Connection closed by peer")))
    assert failure is not None
    assert (failure.cause, failure.cascade) == (Cause.HANG, False)


def test_what_a_rank_says_of_itself_comes_first_and_a_lost_peer_is_a_cascade() -> None:
    told = Failure(Cause.NETWORK, "lost a peer in all-reduce")
    failure = classify(Evidence(rank=2, exit=1, told=told, tail=raised("ModuleNotFoundError: x")))
    assert failure is not None
    assert (failure.cause, failure.cascade) == (Cause.NETWORK, True)
    assert "lost a peer" in failure.message
    told = Failure(Cause.DATA, "shard 3 is truncated", traceback="Traceback (most recent call last):\nX: y")
    failure = classify(Evidence(rank=2, exit=65, told=told))
    assert failure is not None
    assert (failure.cause, failure.cascade) == (Cause.DATA, False)
    assert failure.traceback == told.traceback


def test_the_last_traceback_is_found_behind_prefixes_and_in_chains() -> None:
    lines = [
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "a.py", line 1, in <module>',
        "[rank0]: KeyError: 'first'",
        "[rank0]: ",
        "[rank0]: During handling of the above exception, another exception occurred:",
        "[rank0]: ",
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "a.py", line 3, in <module>',
        "[rank0]:     raise ValueError('second')",
        "[rank0]: ValueError: second",
    ]
    found = last_traceback(lines)
    assert found is not None
    assert final_line(found) == "ValueError: second"
    assert "first" not in found
    assert last_traceback(["no traceback here"]) is None
    assert final_line("Traceback (most recent call last):\n  File") is None


def test_the_record_file_of_torch_serves_where_the_log_has_no_traceback() -> None:
    recorded = "Traceback (most recent call last):\n  File\nValueError: recorded"
    failure = classify(Evidence(rank=0, exit=1, recorded=recorded))
    assert failure is not None
    assert failure.message.endswith("ValueError: recorded")


def test_a_cascade_never_wins_over_a_root() -> None:
    root, later = Failure(Cause.UNKNOWN, "root"), Failure(Cause.OOM, "later")
    cascade = Failure(Cause.NETWORK, "peer gone", cascade=True)
    assert prefer(cascade, root) is root
    assert prefer(root, cascade) is root
    assert prefer(root, later) is root, "of two roots the earlier"
    assert prefer(cascade, None) is cascade
    assert prefer(None, None) is None


@pytest.mark.parametrize(("code", "shell"), [(0, 0), (75, 75), (-9, 137), (-15, 143)])
def test_codes_as_a_shell_gives_them(code: int, shell: int) -> None:
    assert shell_code(code) == shell


def test_oom_kills_are_read_from_both_cgroup_versions(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/\n")
    assert oom_kills(str(root), str(own)) is None
    root.mkdir()
    (root / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(str(root), str(own)) == 2
    v1 = tmp_path / "v1"
    (v1 / "memory" / "pod" / "one").mkdir(parents=True)
    (v1 / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 9\n")
    (v1 / "memory" / "pod" / "one" / "memory.oom_control").write_text("under_oom 0\noom_kill 4\n")
    own.write_text("5:devices:/x\n4:memory:/pod/one\n0::/\n")
    assert oom_kills(str(v1), str(own)) == 4, "its own group's, not the machine's"
    own.write_text("4:memory:/not/visible/here\n")
    assert oom_kills(str(v1), str(own)) == 9, "inside a container the mount's root is its own"
