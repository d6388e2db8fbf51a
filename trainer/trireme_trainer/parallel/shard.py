"""From a bare model on the meta device to one spread over a mesh: recompute, compile, shard, and place in memory.

Gradients are summed, never averaged: the loss is already divided by the global number of valid tokens. A divide factor
of 1.0 needs a forced plain sum with it, because gloo has no pre-multiplied sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from trireme_api.recipe import Recipe

from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.experts import Experts
from trireme_trainer.parallel.experts import AllToAll, shard_dimension, spread_experts
from trireme_trainer.parallel.prefetch import set_prefetch
from trireme_trainer.parallel.tensor import divide_layers


def shard_model(
    model: LanguageModel, recipe: Recipe, mesh: DeviceMesh, device: torch.device, compile_backend: str,
    expert_mesh: DeviceMesh | None = None, tensor_mesh: DeviceMesh | None = None,
) -> None:  # fmt: skip
    """Makes each part of `model` (of most: itself) an FSDP module on `device`, in place. Its parameters are memory
    without values afterwards.

    With `expert_mesh` (see `build_expert_mesh`) the experts of each mixture are a unit of their own, spread over its
    dimension "expert" and by FSDP over the others. With `tensor_mesh` (see `build_tensor_mesh`) the layers in the
    blocks are, and FSDP has its other dimensions for all of a block.
    """
    blocks: Sequence[nn.Module] = [block for part in model.parts() for block in part.blocks]
    if tensor_mesh is not None:
        divide_layers(model, tensor_mesh["tensor"])
    if expert_mesh is not None:
        for experts in experts_of(model):
            spread_experts(experts, expert_mesh["expert"])
    if recipe.activation_checkpointing:
        for block in blocks:
            # On the bound method, not by a wrapper module: parameter names, and checkpoints with them, stay.
            block.forward = _recomputing(block.forward)
    if recipe.compile:
        for block in blocks:
            for part in _compilable(block):
                part.compile(backend=compile_backend, fullgraph=True)
    reshard = recipe.parallelism.reshards_after_forward
    policy = _precision(recipe)
    of_blocks = mesh if tensor_mesh is None else _without(tensor_mesh, "tensor")
    roots: list[FSDPModule] = []
    for part in model.parts():
        units: list[list[FSDPModule]] = []
        for block in part.blocks:
            inner = [_shard_experts(one, expert_mesh, policy, reshard) for one in experts_of(block) if expert_mesh]
            units.append([fully_shard(block, mesh=of_blocks, mp_policy=policy, reshard_after_forward=reshard), *inner])
        # Embeddings (tied to the output layer) and the last norm stay gathered until backward: it needs them first.
        roots.append(fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False))
        set_prefetch(roots[-1], units, recipe.parallelism.prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Outside the blocks the ranks of a tensor group compute the same: each has the gradient of all their tokens.
    for root in roots:
        root.set_gradient_divide_factor(float(recipe.parallelism.tensor))
    model.to_empty(device=device)


def experts_of(module: nn.Module) -> list[Experts]:
    return [part for part in module.modules() if isinstance(part, Experts)]


def _shard_experts(
    experts: Experts, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool
) -> FSDPModule:
    ranks = mesh["shard"].size()
    unit = fully_shard(
        experts, mesh=_without(mesh, "expert"), mp_policy=policy, reshard_after_forward=reshard,
        shard_placement_fn=lambda weight: shard_dimension(weight, ranks),
    )  # fmt: skip
    register_fsdp_forward_method(experts, "grouped")
    return unit


def _without(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Its other dimensions."""
    return mesh[tuple(other for other in mesh.mesh_dim_names or () if other != name)]


def _compilable(block: nn.Module) -> list[nn.Module]:
    """The block; or, as no unit of FSDP can be inside one graph, its layers without experts that are one."""
    if not any(isinstance(experts.exchange, AllToAll) for experts in experts_of(block)):
        return [block]
    return [layer for layer in block.children() if list(layer.children()) and not experts_of(layer)]


class Accumulation:
    """When gradients of an accumulated step travel: `parallelism.accumulation` (FSDP paper §3.3.4), the same sum.

    Whole gradients that stay on the rank cost their memory. Parameters that stay gathered after the forward pass stay
    so between micro-batches too, where gradients do.
    """

    def __init__(self, model: LanguageModel, recipe: Recipe) -> None:
        self._roots = [part for part in model.trained() if isinstance(part, FSDPModule)]
        spec = recipe.parallelism
        self._local = spec.accumulates_locally
        self._between_groups_last = spec.accumulation == "auto" and spec.shard == "hybrid"
        self._keep_parameters = self._local and not spec.reshards_after_forward

    def turns(self, count: int) -> Callable[[], None]:
        """A function to call before each of the `count` forward passes of a step."""
        numbers = iter(range(count))
        return lambda: self.before(next(numbers), count)

    def before(self, index: int, count: int) -> None:
        """Call before the forward pass `index` of the `count` of a step; of an ensemble, of each of its members."""
        if count == 1:
            return
        last = index == count - 1
        for root in self._roots:
            root.set_is_last_backward(last)
            if self._between_groups_last:
                root.set_requires_all_reduce(last)
            if self._local:
                root.set_requires_gradient_sync(last)
            if self._keep_parameters:
                root.set_reshard_after_backward(last)


def _recomputing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward`, its activations dropped and computed again in the backward pass. A function of ours, not a `partial`
    of torch's: Dynamo does not trace frames of torch itself."""

    @functools.wraps(forward)
    def run(*inputs: Tensor | None) -> Tensor:
        out: Tensor = checkpoint(forward, *inputs, use_reentrant=False)
        return out

    return run


def _precision(recipe: Recipe) -> MixedPrecisionPolicy:
    if recipe.precision == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    half = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
