"""One rank of the peer: Hugging Face Transformers' OPT under Accelerate (FSDP2 with several ranks), the same work.

The same weights to begin with, the same samples in the same order, AdamW (fused), the same clipping. Its data lie in
memory before the clock starts, and it reports once at the end: what it is timed for is training alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, TorchDynamoPlugin
from torch.distributed.fsdp import FSDPModule
from transformers import OPTConfig, OPTForCausalLM
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import build
from trireme_trainer.families.convert import config_to_hugging_face, to_hugging_face
from trireme_trainer.layers.init import full_value

Batch = tuple[torch.Tensor, torch.Tensor]


def main(recipe: Recipe, warm: int, output: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    micro = recipe.batch.micro
    accumulate = recipe.sequences_per_step // (world * micro)
    accelerator = Accelerator(
        cpu=not cuda,
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        gradient_accumulation_steps=accumulate,
        fsdp_plugin=_fsdp(recipe) if world > 1 else None,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", use_regional_compilation=True) if recipe.compile else None,
    )
    if world > 1 and not cuda:
        _fsdp_on_cpu(accelerator, recipe)
    model = _model(recipe)
    if recipe.activation_checkpointing and world == 1:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    spec = recipe.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), spec.learning_rate, spec.betas, spec.eps, spec.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if world > 1 and not any(isinstance(module, FSDPModule) for module in model.modules()):
        sys.exit("Accelerate did not shard the model: this would not be a comparison of FSDP2")
    model.train()
    mixture, size = Mixture.from_recipe(recipe), recipe.sequences_per_step
    batches = [_batch(mixture, size, step, rank, world, accelerator.device) for step in range(recipe.total_steps)]
    losses: list[torch.Tensor] = []
    marks = []
    for step, (tokens, targets) in enumerate(batches):
        if step in (0, 1, warm):
            _synchronize(cuda)
        marks.append(time.perf_counter())
        total = torch.zeros((), device=accelerator.device)
        for i in range(accumulate):
            part = slice(i * micro, (i + 1) * micro)
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens[part], labels=targets[part], shift_labels=targets[part]).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), spec.clip)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / accumulate
        losses.append(total)
    _synchronize(cuda)
    marks.append(time.perf_counter())
    if cuda:
        # The host only queues work: what is known is how long all timed steps took together.
        steps = [(marks[-1] - marks[warm]) / (recipe.total_steps - warm)] * (recipe.total_steps - warm)
    else:
        steps = [end - begin for begin, end in pairwise(marks[warm:])]
    means = [accelerator.reduce(loss, reduction="mean").item() for loss in losses]
    if rank == 0:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = torch.cuda.max_memory_allocated() if cuda else resident
        result: dict[str, Any] = {
            "steps": steps,
            "firstStepSeconds": marks[1] - marks[0],
            "losses": means,
            "peakMemoryBytes": memory,
        }
        output.write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    # Its gloo threads now and then keep the interpreter from ending, long after the last step.
    os._exit(0)


def _model(recipe: Recipe) -> OPTForCausalLM:
    config = check_recipe(recipe)
    with torch.device("meta"):
        ours = build(config)
    values = {n: full_value(n, tuple(p.shape), ours.initial_value(n), recipe.seed) for n, p in ours.named_parameters()}
    model = OPTForCausalLM._from_config(
        OPTConfig(**config_to_hugging_face(config)), attn_implementation="sdpa", dtype=torch.float32
    )
    loaded = model.load_state_dict(to_hugging_face(config, values), strict=False)
    if loaded.unexpected_keys or set(loaded.missing_keys) - {"lm_head.weight"}:
        sys.exit(f"weights do not fit: {loaded}")
    model.tie_weights()
    return model


def _fsdp(recipe: Recipe) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=recipe.parallelism.shard != "grad-op",
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["OPTDecoderLayer"],
        activation_checkpointing=recipe.activation_checkpointing,
        cpu_ram_efficient_loading=False,
    )


def _fsdp_on_cpu(accelerator: Accelerator, recipe: Recipe) -> None:
    """Accelerate leaves its FSDP plugin aside on CPUs and falls back to DistributedDataParallel without a word. Its
    FSDP2 code itself runs there; this is what it does for devices on its list."""
    plugin = _fsdp(recipe)
    if recipe.precision == "bf16":
        plugin.set_mixed_precision("bf16")
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def _batch(mixture: Mixture, size: int, step: int, rank: int, world: int, device: torch.device) -> Batch:
    """Tokens and targets of a step, [sequences of this rank, T] each; `size` sequences over all ranks."""
    blocks = np.stack([mixture.sample(step * size + i) for i in range(rank, size, world)])
    block = torch.from_numpy(blocks).to(device)
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(Recipe.model_validate(json.loads(Path(sys.argv[1]).read_text())), int(sys.argv[2]), Path(sys.argv[3]))
