"""Ranks arranged for a sharding: one dimension, or groups that shard inside and replicate across (FSDP paper §3.2)."""

from __future__ import annotations

import logging

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from trireme_api.parallelism import ParallelismSpec

from trireme_trainer.parallel.world import World

log = logging.getLogger(__name__)


def build_mesh(spec: ParallelismSpec, world: World) -> DeviceMesh:
    size = spec.shard_ranks(world.size, world.local_size)
    if spec.shard != "hybrid":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if spec.shard_size and size != spec.shard_size and world.rank == 0:
        log.warning("parallelism.shardSize %d: groups of %d, for %d ranks", spec.shard_size, size, world.size)
    shape = (world.size // size, size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def build_expert_mesh(spec: ParallelismSpec, world: World) -> DeviceMesh | None:
    """The same ranks with those that share out the experts apart, so that tokens stay in a node where they can. FSDP
    takes what is left of a shard group. None without expert parallelism."""
    return _with_inner(spec, world, "expert", spec.expert)


def build_tensor_mesh(spec: ParallelismSpec, world: World) -> DeviceMesh | None:
    """The same ranks with those that compute each layer together apart. None without tensor parallelism."""
    return _with_inner(spec, world, "tensor", spec.tensor)


def _with_inner(spec: ParallelismSpec, world: World, name: str, ranks: int) -> DeviceMesh | None:
    """`ranks` consecutive ones in a dimension of their own."""
    if ranks == 1:
        return None
    size = spec.shard_ranks(world.size, world.local_size)
    shape: tuple[int, ...] = (size // ranks, ranks)
    names: tuple[str, ...] = ("shard", name)
    if spec.shard == "hybrid":
        shape, names = (world.size // size, *shape), ("replicate", *names)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def groups(*meshes: DeviceMesh | None) -> list[ProcessGroup]:
    """Of every dimension of the meshes that are there."""
    return [mesh.get_group(name) for mesh in meshes if mesh is not None for name in mesh.mesh_dim_names or ()]
