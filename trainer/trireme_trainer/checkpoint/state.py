"""From nested state to one flat dict of tensors by name, the same names at any world size and under any wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What activation checkpointing, compile and FSDP1 put into names; a checkpoint must not depend on them."""


def flatten(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """`{"model": {"a.b": t}}` to `{"model.a.b": t}`; the tensors are the same objects, DTensors stay DTensors.

    Raises TypeError for a leaf that is not a tensor (numbers and strings belong into `meta`), ValueError for two
    leaves with one name.
    """
    flat: dict[str, Tensor] = {}
    _collect("", state, flat)
    return flat


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name, sharded as they lie between steps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward without a backward the root still holds gathered parameters, not the shards.
            module.reshard()
    found: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return {plain_name(name): tensor for name, tensor in found.items()}


def plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _collect(prefix: str, value: Any, flat: dict[str, Tensor]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(f"{prefix}.{key}" if prefix else str(key), inner, flat)
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"checkpoint state {prefix!r} is a {type(value).__name__}, not a tensor; put it into meta")
    name = plain_name(prefix)
    if name in flat:
        raise ValueError(f"checkpoint state has two tensors named {name!r}")
    flat[name] = value
