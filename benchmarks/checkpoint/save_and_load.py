"""What a checkpoint costs: how long training waits, how long until it is committed, how fast it is verified and loaded.

    python benchmarks/checkpoint/save_and_load.py --ranks 2 --megabytes 100 --directory /path/on/the/storage

Beside it in the same run, in turn, on the same sharded state: `torch.distributed.checkpoint.save` (blocking) and
`async_save`, which write the same tensors without manifest, fsync of directories, fence or commit. Prints a table of
medians and writes JSON. Reads after a save come from the page cache unless the machine has little memory.

Last, the tier in memory (--memory-directory, a tmpfs): a save with one copy to the next rank's folder, a restore from
one's own shard, and one where rank 1's folder is gone and its shard comes from the copy. Each rank plays a pod.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=100, help="state of the whole gang, 10^6 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; left out: a temporary directory")
    parser.add_argument("--memory-directory", type=Path, default=Path("/dev/shm"), help="a folder on tmpfs")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank(options)
        return
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.directory))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.ranks)}
    memory = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.memory_directory))
    common |= {"OMP_NUM_THREADS": "1", "BENCHMARK_ROOT": str(directory), "BENCHMARK_MEMORY": str(memory)}
    try:
        gang = [
            subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **common, "RANK": str(r)})
            for r in range(options.ranks)
        ]
        codes = [member.wait() for member in gang]
        if any(codes):
            sys.exit(f"ranks ended with {codes}")
        result = json.loads((directory / "result.json").read_text())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from trireme_trainer.checkpoint import Checkpointer, CheckpointStore

    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (options.ranks,))
    tensors = 24
    rows = options.megabytes * 1_000_000 // (tensors * 1024 * 4)
    state = {f"t{i}": distribute_tensor(torch.randn(rows, 1024), mesh, [Shard(0)]) for i in range(tensors)}
    root = Path(os.environ["BENCHMARK_ROOT"])
    samples: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        dist.barrier()
        start = time.perf_counter()
        value = run()
        samples.setdefault(name, []).append(time.perf_counter() - start)
        return value

    checkpointer = Checkpointer(CheckpointStore(str(root / "trireme")), attempt=1, keep=1)
    for step in range(1, options.rounds + 2):
        if step == 2:
            samples.clear()  # the first round allocates buffers and imports
        timed("save blocks", lambda: checkpointer.save(step, state, {}))  # noqa: B023
        checkpointer.wait()
        timing = checkpointer.timings[-1]
        samples.setdefault("save total", []).append(timing.total)
        samples.setdefault("  writing", []).append(timing.writing)
        samples.setdefault("  committing", []).append(timing.committing)
        samples.setdefault("  removing the old one", []).append(timing.retaining)
        loaded = checkpointer.load(state)
        assert loaded is not None
        samples.setdefault("load: verify", []).append(loaded.verify_seconds)
        samples.setdefault("load: read", []).append(loaded.read_seconds)
        theirs = root / f"torch-{step}"
        timed("torch save", lambda: dcp.save(state, checkpoint_id=theirs / "a", process_group=group))  # noqa: B023
        start = time.perf_counter()
        future = timed(
            "torch async_save blocks",
            lambda: dcp.async_save(state, checkpoint_id=theirs / "b", process_group=group),  # noqa: B023
        )
        future.result()
        samples.setdefault("torch async_save total", []).append(time.perf_counter() - start)
        timed("torch load", lambda: dcp.load(state, checkpoint_id=theirs / "a", process_group=group))  # noqa: B023
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(theirs)
    checkpointer.close()
    in_memory(state, options, samples, timed)
    if dist.get_rank() == 0:
        report(samples, options, tensors * rows * 1024 * 4, root)
    dist.barrier()
    dist.destroy_process_group()


def in_memory(
    state: dict[str, Any], options: argparse.Namespace, samples: dict[str, list[float]], timed: Callable[..., Any]
) -> None:
    """Two attempts a round: one saves, the next finds what it left."""
    import torch.distributed as dist
    from trireme_trainer.checkpoint import MemoryFolder, MemoryTier

    me, world = dist.get_rank(), dist.get_world_size()
    folder = Path(os.environ["BENCHMARK_MEMORY"]) / f"pod-{me}"
    attempt = 0

    def open_tier() -> MemoryTier:
        nonlocal attempt
        attempt += 1
        return MemoryTier(MemoryFolder(str(folder), attempt=attempt), attempt=attempt, replicas=1, per_node=1)

    def restore(tier: MemoryTier) -> Any:
        tier.newest()
        restored, _ = tier.restore(state)
        assert restored is not None
        return restored

    tier = open_tier()
    for number in range(1, options.rounds + 3):
        tier.save(2 * number, state, {})
        tier.wait()
        tier.poll()
        dist.barrier()
        timed("memory save blocks", lambda: tier.save(2 * number + 1, state, {}))  # noqa: B023
        tier.wait()
        (timing,) = tier.poll()
        if number > 2:  # pages are taken from the system at first, then used again
            samples.setdefault("memory save total", []).append(timing.total)
            samples.setdefault("  hashing, publishing", []).append(timing.sealing)
            samples.setdefault("  copy to a peer", []).append(timing.copying)
        else:
            samples.pop("memory save blocks", None)
    tier.close()
    for _ in range(options.rounds):
        tier = open_tier()
        timed("memory restore, own shard", lambda: restore(tier))  # noqa: B023
        tier.close()
        if world == 1:
            continue
        if me == 1:
            shutil.rmtree(folder)
        tier = open_tier()
        timed("memory restore, one from a peer", lambda: restore(tier))  # noqa: B023
        tier.close()


def report(samples: dict[str, list[float]], options: argparse.Namespace, size: int, root: Path) -> None:
    import torch

    result = {
        "ranks": options.ranks,
        "bytes": size,
        "rounds": options.rounds,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": {
            name.strip(): {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in samples.items()
        },
    }
    print(f"{size / 1e6:.0f} MB of state, {options.ranks} ranks, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'':<32}{'median s':>9}{'min':>9}{'max':>9}{'MB/s':>8}")
    for name, values in samples.items():
        median = statistics.median(values)
        speed = f"{size / 1e6 / median:8.0f}" if median > 1e-4 else ""
        print(f"{name:<32}{median:9.4f}{min(values):9.4f}{max(values):9.4f}{speed}")
    (root / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
