"""Initial weights by parameter name: every rank makes just its rows, and every sharding gets the same model.

The FSDP paper's deferred initialisation (2304.11277 §3.1) replays recorded operations unit by unit and shards each
before the next, so that one whole unit lies on a rank at a time. Here not even that: beside the shards there is one
parameter's share of this rank, on the host.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.init import full_value, value_rows


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fills every parameter of a sharded or plain model in place, without communication."""
    for name, parameter in model.named_parameters():
        rule = model.initial_value(name)
        if not isinstance(parameter, DTensor):
            parameter.copy_(full_value(name, tuple(parameter.shape), rule, seed))
            continue
        local: Tensor = parameter.to_local()
        if local.numel() == 0:
            continue
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        values = value_rows(name, tuple(parameter.shape), rule, seed, offset[0], offset[0] + shape[0])
        for dimension in range(1, values.dim()):
            values = values.narrow(dimension, offset[dimension], shape[dimension])
        local.copy_(values)


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what this rank holds of them."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).untyped_storage().nbytes() for t in tensors)
