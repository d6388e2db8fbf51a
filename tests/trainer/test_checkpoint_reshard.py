"""What was saved by any world is loaded by any other, bit by bit; and a save keeps the state of its own moment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint_worker import expected, register_bucket, run_cases
from trireme_trainer.checkpoint import Checkpointer, CheckpointStore, IncompatibleCheckpoint, model_state
from trireme_trainer.checkpoint.state import flatten, plain_name


@pytest.mark.parametrize("scheme", ["", "bucket://"], ids=["filesystem", "object-store"])
def test_four_then_two_then_three_then_one(tmp_path: Path, scheme: str) -> None:
    """Nothing divides 101, 50 or 7; each gang loads what the one before wrote and writes the next."""
    gangs = [(4, "fsdp"), (2, "fsdp"), (3, "fsdp"), (1, "plain"), (4, "hsdp"), (2, "fsdp"), (1, "plain")]
    cases = [
        {
            "mode": "load", "uri": f"{scheme}{tmp_path}/root", "world": world, "mesh": mesh, "attempt": i + 1,
            "steps": [10 * (i + 1)],
        }
        for i, (world, mesh) in enumerate(gangs)
    ]  # fmt: skip
    before = None
    for i, (ranks, (world, _)) in enumerate(zip(run_cases(cases), gangs, strict=True)):
        assert len(ranks) == world
        for rank in ranks:
            assert rank["exit"] == 0, rank["stderr"]
            assert rank["committed"] == [10 * (i + 1)]
            if before is None:
                assert "step" not in rank
                continue
            assert rank["step"] == 10 * i
            assert rank["world"] == before
            assert rank["digest"] == expected(10 * i)
            assert rank["meta"] == {"step": 10 * i, "position": 80 * i}
        before = world


def test_replicas_are_written_once(tmp_path: Path) -> None:
    """HSDP 2×2 holds everything twice; the files must not."""
    cases = [
        {"mode": "save", "uri": f"{tmp_path}/{mesh}", "world": 4, "mesh": mesh, "attempt": 1, "steps": [1]}
        for mesh in ("hsdp", "fsdp")
    ]
    run_cases(cases)
    sizes = [CheckpointStore(f"{tmp_path}/{mesh}") for mesh in ("hsdp", "fsdp")]
    hsdp, fsdp = (store.manifest(store.candidates()[0]).size for store in sizes)
    assert hsdp < 1.3 * fsdp


def test_every_file_is_in_the_manifest_and_torch_can_read_it_alone(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1)
    weight = torch.randn(5, 3)
    checkpointer.save(7, {"model": {"weight": weight}}, {})
    checkpointer.wait()
    directory = tmp_path / "step-00000007"
    manifest = CheckpointStore(str(tmp_path)).manifest(CheckpointStore(str(tmp_path)).candidates()[0])
    assert {e.name for e in manifest.files} | {"MANIFEST.json"} == {f.name for f in directory.iterdir()}
    state = {"model.weight": torch.zeros(5, 3)}
    dcp.load(state, checkpoint_id=directory)
    assert torch.equal(state["model.weight"], weight)


def test_updates_in_place_after_save_are_not_saved(tmp_path: Path) -> None:
    """The writer is held back until the live tensors have changed."""
    import threading

    changed = threading.Event()

    def on_stage(stage: str) -> None:
        if stage == "opened":
            assert changed.wait(30)

    weight = torch.arange(12.0).reshape(3, 4)
    view = torch.arange(20.0)[5:9]
    state = {"weight": weight, "view": view, "half": torch.ones(3, dtype=torch.bfloat16)}
    before = {name: tensor.clone() for name, tensor in state.items()}
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1, on_stage=on_stage)
    meta = {"tokens": [1]}
    checkpointer.save(1, state, meta)
    for tensor in state.values():
        tensor.zero_()
    meta["tokens"].append(2)
    changed.set()
    checkpointer.wait()
    loaded = Checkpointer(CheckpointStore(str(tmp_path)), attempt=2).load(state)
    assert loaded is not None
    assert loaded.meta == {"tokens": [1]}
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])


def test_a_second_save_waits_for_the_first_and_reuses_its_buffers(tmp_path: Path) -> None:
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1, keep=9)
    weight = torch.zeros(1000, 100)
    for step in range(1, 6):
        weight.fill_(step)
        assert checkpointer.save(step, {"weight": weight}, {})
        weight.fill_(-1)
    checkpointer.wait()
    assert [ref.step for ref in checkpointer.poll()] == [1, 2, 3, 4, 5]
    assert checkpointer.poll() == []
    assert all(timing.total > 0 and timing.size == weight.nbytes for timing in checkpointer.timings)
    assert not checkpointer.save(5, {"weight": weight}, {}), "the same step is not written twice"
    store = CheckpointStore(str(tmp_path))
    for candidate in store.candidates():
        assert store.verify(candidate) == []
    target = torch.empty_like(weight)
    loaded = Checkpointer(store, attempt=2).load({"weight": target})
    assert loaded is not None
    assert (target == 5).all()


def test_object_store_in_memory(tmp_path: Path) -> None:
    uri = f"memory://jobs/{tmp_path.name}"
    checkpointer = Checkpointer(CheckpointStore(uri), attempt=3, keep=2)
    weight = torch.zeros(4)
    for step in (1, 2, 3):
        checkpointer.save(step, {"weight": weight + step}, {"step": step})
    checkpointer.wait()
    assert [ref.path for ref in checkpointer.poll()] == [f"{uri}/step-{s:08d}.attempt-3" for s in (1, 2, 3)]
    assert [c.step for c in CheckpointStore(uri).candidates()] == [3, 2]
    loaded = Checkpointer(CheckpointStore(uri), attempt=4).load({"weight": weight})
    assert loaded is not None
    assert loaded.step == 3
    assert weight.tolist() == [3] * 4


def test_file_url_is_the_path(tmp_path: Path) -> None:
    checkpointer = Checkpointer(CheckpointStore(f"file://{tmp_path}/deep/er"), attempt=1)
    checkpointer.save(1, {"w": torch.ones(2)}, {})
    checkpointer.wait()
    assert (tmp_path / "deep/er/step-00000001/MANIFEST.json").is_file()


def test_bucket_has_no_rename(tmp_path: Path) -> None:
    """The stand-in for an object store is one: what the store must not use, it refuses."""
    import fsspec

    register_bucket()
    filesystem = fsspec.filesystem("bucket")
    with pytest.raises(NotImplementedError):
        filesystem.mv(f"{tmp_path}/a", f"{tmp_path}/b")


def test_another_model_is_refused_by_name_not_half_loaded(tmp_path: Path) -> None:
    Checkpointer(CheckpointStore(str(tmp_path)), attempt=1).close()
    checkpointer = Checkpointer(CheckpointStore(str(tmp_path)), attempt=1)
    checkpointer.save(1, {"model": {"a": torch.ones(2, 3), "b": torch.ones(2)}}, {})
    checkpointer.wait()
    target = torch.zeros(2, 3)
    for wrong, words in [
        ({"a": target, "b": torch.zeros(5)}, r"model.b is \[2\], this job needs \[5\]"),
        ({"a": target}, "model.b is not part of this job"),
        ({"a": target, "b": torch.zeros(2), "c": torch.zeros(1)}, "model.c is missing"),
        ({"a": target, "b": torch.zeros(2, dtype=torch.int64)}, "torch.float32, this job needs torch.int64"),
    ]:
        with pytest.raises(IncompatibleCheckpoint, match=words):
            checkpointer.load({"model": wrong})
        assert not target.any()
    assert checkpointer.load({"model": {"a": target}}, strict=False) is not None
    assert target.all()


def test_names_do_not_depend_on_wrappers() -> None:
    assert plain_name("blocks.0._checkpoint_wrapped_module._orig_mod.attention.weight") == "blocks.0.attention.weight"
    tied = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    tied["head"].weight = tied["embed"].weight
    tied.register_buffer("kept", torch.zeros(1))
    tied.register_buffer("dropped", torch.zeros(1), persistent=False)
    assert sorted(model_state(tied)) == ["embed.weight", "kept"]
    with pytest.raises(TypeError, match=r"optimizer.lr' is a float"):
        flatten({"optimizer": {"lr": 0.1}})
    with pytest.raises(ValueError, match=r"two tensors named 'a.b'"):
        flatten({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})
