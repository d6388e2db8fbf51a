"""AdamW on sharded parameters: moments are DTensors sharded like their weights; a bad step is skipped on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from trireme_api.recipe import OptimizerSpec


class Optimizer:
    """`torch.optim.AdamW`, the same for all: OPT decays every parameter (metaseq has no exclusion list).

    Its state exists from the start, so that a checkpoint can be loaded into it before the first step.
    """

    def __init__(self, model: nn.Module, spec: OptimizerSpec) -> None:
        self._names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        parameters = list(self._names.values())
        self._parameters = parameters
        self._meshes = _by_mesh(parameters)
        self._clip = spec.clip
        self._adamw = torch.optim.AdamW(
            [{"params": alike} for alike in self._meshes.values()],
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=True,
        )
        for parameter in parameters:
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def clip(self, loss_scale: Tensor | None = None) -> Tensor:
        """Divides gradients by the scale of their loss, if any ([]), then scales them down to the recipe's global L2
        norm. Returns the norm in between: [], equal on all ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if loss_scale is not None:
            inverse = loss_scale.reciprocal().to(torch.float32)
            torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], inverse)
        norm = _total_norm(gradients, list(self._meshes))
        if self._clip > 0:
            for alike in self._meshes.values():
                torch.nn.utils.clip_grads_with_norm_(alike, self._clip, norm)
        return norm

    def step(self, learning_rate: float, skip: Tensor) -> None:
        """One AdamW step, and gradients dropped. Where `skip` ([], float32) is 1.0 nothing changes."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        # The fused kernel's own way to leave weights, moments and step count alone without asking the host.
        self._adamw.found_inf = skip  # type: ignore[attr-defined]
        self._adamw.grad_scale = None  # type: ignore[attr-defined]
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """As before the first step."""
        for parameter in self._parameters:
            for value in self._adamw.state[parameter].values():
                value.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Keyed by parameter name, so that it loads at any world size. The tensors are the live ones."""
        states = {name: self._adamw.state[parameter] for name, parameter in self._names.items()}
        return {
            "exp_avg": {name: state["exp_avg"] for name, state in states.items()},
            "exp_avg_sq": {name: state["exp_avg_sq"] for name, state in states.items()},
            # Every parameter takes every step: one count stands for all.
            "step": next(iter(states.values()))["step"].clone(),
        }

    def loaded(self, state: dict[str, Any]) -> None:
        """Takes over what loading could not write in place."""
        for parameter in self._parameters:
            self._adamw.state[parameter]["step"].copy_(state["step"])


def _by_mesh(parameters: list[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """One operation on many sharded tensors takes those of one mesh; experts may have one of their own."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return found


def _total_norm(gradients: list[Tensor], meshes: list[DeviceMesh | None]) -> Tensor:
    """[], equal on all ranks."""
    if len(meshes) == 1:
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    # Whatever their mesh, together the ranks of one model have every gradient; some of them several times.
    meshed = [mesh for mesh in meshes if mesh is not None]
    model = min(meshed, key=lambda mesh: (mesh.ndim, -mesh.size()))["shard"]
    square = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    for mesh in meshed:
        parts = [g.to_local() for g in gradients if isinstance(g, DTensor) and g.device_mesh == mesh]
        square += torch.nn.utils.get_total_norm(parts).square() * (_cut(mesh) / model.size())
    dist.all_reduce(square, group=model.get_group())
    return square.sqrt()


def _cut(mesh: DeviceMesh) -> int:
    """Ranks that a parameter on `mesh` lies on once."""
    sizes = zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
    return math.prod(size for name, size in sizes if name != "replicate")
