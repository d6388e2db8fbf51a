"""Gangs of real processes for the checkpoint tests: a case is a small JSON program that every rank runs.

One interpreter imports torch once and forks the ranks of each case, so that a case can be killed with SIGKILL and
the next one starts clean. Run as a script: cases as JSON on stdin, one JSON list of outcomes per case on stdout.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES = {"embed.weight": (101, 24), "up.weight": (50, 24), "up.bias": (50,), "down.weight": (24, 50), "scale": (7,)}
"""Sizes that no world of 2, 3 or 4 ranks divides."""


def run_cases(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Outcomes by case and rank: what the rank returned, and `signal` or `exit` of how it ended."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    outcomes: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    for outcome in outcomes:
        for rank in outcome:
            rank["stderr"] = done.stderr[-4000:]
    return outcomes


def value(name: str, step: int) -> Any:
    """The full tensor `name` at `step`: any bits, the same for every world size."""
    import torch

    seed = int.from_bytes(hashlib.sha256(f"{name}@{step}".encode()).digest()[:7], "big")
    shape = SHAPES[name.split("/", 1)[1]] if "/" in name else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digest(state: dict[str, Any]) -> str:
    """Of all tensors, gathered: equal digests are equal bits."""
    from torch.distributed.tensor import DTensor
    from trireme_trainer.checkpoint.state import flatten

    total = hashlib.sha256()
    for name, tensor in sorted(flatten(state).items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def build(case: dict[str, Any], world: int) -> dict[str, Any]:
    """Nested state of a small model under FSDP2 (`mesh`: fsdp | hsdp | plain), moments included, all zero."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from trireme_trainer.checkpoint import model_state

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(101, 24)
            self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 24, bias=False)
            self.register_buffer("scale", torch.zeros(7))

    model = Model()
    if world > 1:
        shape = (2, world // 2) if case.get("mesh") == "hsdp" else (world,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    parameters = model_state(model)
    state = {
        "model": parameters,
        "optimizer": {
            "exp_avg": {n: torch.zeros_like(t) for n, t in parameters.items()},
            "exp_avg_sq": {n: torch.zeros_like(t) for n, t in parameters.items()},
            "step": torch.zeros(()),
        },
    }
    fill(state, None)
    return state


def fill(state: dict[str, Any], step: int | None) -> None:
    """Every tensor becomes its value at `step`, or zeros."""
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor

    groups = {"model": state["model"], **{k: v for k, v in state["optimizer"].items() if k != "step"}}
    with torch.no_grad():
        state["optimizer"]["step"].fill_(step or 0)
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                full = torch.zeros(SHAPES[name]) if step is None else value(f"{group}/{name}", step)
                if isinstance(tensor, DTensor):
                    whole = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
                    tensor.to_local().copy_(whole.to_local())
                else:
                    tensor.copy_(full)


@functools.cache
def expected(step: int) -> str:
    """The digest of the state at `step`, made by one process without any parallelism."""
    state = build({}, 1)
    fill(state, step)
    return digest(state)


def run(case: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """mode save: saves `steps` one by one. mode load: loads first, and tells what it got. Errors come back as text."""
    from trireme_trainer.checkpoint import Checkpointer, CheckpointError, CheckpointStore

    if case["uri"].startswith("bucket:"):
        register_bucket()
    kill, armed = case.get("kill"), []

    def on_stage(stage: str) -> None:
        if armed and kill and stage == kill["stage"] and rank == kill["rank"]:
            os.kill(os.getpid(), signal.SIGKILL)

    state = build(case, world)
    outcome: dict[str, Any] = {"committed": []}
    try:
        store = CheckpointStore(case["uri"], files=faulty(case, rank))
        checkpointer = Checkpointer(store, attempt=case["attempt"], keep=case.get("keep", 3), on_stage=on_stage)
        outcome["abandoned"] = checkpointer.abandoned
        if case["mode"] == "load":
            loaded = checkpointer.load(state)
            if loaded is not None:
                outcome |= {
                    "step": loaded.step,
                    "meta": loaded.meta,
                    "skipped": loaded.skipped,
                    "digest": digest(state),
                }
                outcome["world"] = loaded.manifest.world_size
        for step in case.get("steps", []):
            if kill and step == kill["step"]:
                armed.append(True)
            fill(state, step)
            checkpointer.save(step, state, {"step": step, "position": step * 8})
            fill(state, 999_999)  # training goes on in place while the background thread writes
            with contextlib.suppress(CheckpointError):
                checkpointer.wait()
            outcome["committed"] += [ref.step for ref in checkpointer.poll()]
            outcome.setdefault("failures", []).extend(str(failure) for failure in checkpointer.failures())
        checkpointer.close()
    except CheckpointError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    return outcome


def faulty(case: dict[str, Any], rank: int) -> Any:
    """With `full`: {step, rank, after}, the disk of that rank is full once `after` bytes of that step are written."""
    from trireme_trainer.checkpoint.files import PosixFiles

    full = case.get("full")
    if not full or full["rank"] != rank:
        return None
    import errno

    class FullDisk(PosixFiles):
        @contextlib.contextmanager
        def create(self, directory: str, name: str) -> Iterator[Any]:
            with super().create(directory, name) as stream:
                if not directory.startswith(f"step-{full['step']:08d}"):
                    yield stream
                    return
                room = [full["after"]]

                class Limited:
                    def write(self, data: Any) -> int:
                        room[0] -= len(data)
                        if room[0] < 0:
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                        return stream.write(data)

                    def flush(self) -> None:
                        stream.flush()

                yield Limited()

    return FullDisk(case["uri"])


def register_bucket() -> None:
    """bucket:///path: an object store on local files. It has no rename, no links, and an object appears when closed."""
    import io

    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Upload(io.BytesIO):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def close(self) -> None:
            if not self.closed:
                partial = Path(tempfile.gettempdir(), f"upload-{os.getpid()}-{id(self)}")
                partial.write_bytes(self.getvalue())
                shutil.move(partial, self.path)
            super().close()

    class Bucket(LocalFileSystem):
        protocol = ("bucket",)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(str(path).removeprefix("bucket://")))

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            if mode != "wb":
                return super()._open(path, mode, **kwargs)
            self.makedirs(self._parent(path), exist_ok=True)
            return Upload(path)

        def mv(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError("an object store has no rename")

        rename = mv_file = mv

    fsspec.register_implementation("bucket", Bucket, clobber=True)


def _rank(case: dict[str, Any], rank: int, world: int, rendezvous: str, out: Path) -> None:
    import torch.distributed as dist

    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    out.write_text(json.dumps(run(case, rank, world)))


def _fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _main() -> None:
    import torch
    import torch._dynamo  # fully_shard would import it in every child
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import trireme_trainer.checkpoint.checkpointer  # noqa: F401

    torch.set_num_threads(1)
    results = []
    for case in json.load(sys.stdin):
        world = case.get("world", 1)
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / f"rank-{rank}" for rank in range(world)]
            pids = [
                _fork(functools.partial(_rank, case, rank, world, f"{scratch}/rendezvous", files[rank]))
                for rank in range(world)
            ]
            ended = [os.waitpid(pid, 0)[1] for pid in pids]
            results.append(
                [
                    {
                        **(json.loads(file.read_text()) if file.exists() else {}),
                        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                    }
                    for file, status in zip(files, ended, strict=True)
                ]
            )
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
