"""The closed-form FLOPs of api against what the real modules execute."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trireme_api.families import PRESETS
from trireme_trainer import families

BATCH, LENGTH = 2, 96


def _meta(name: str) -> families.LanguageModel:
    with torch.device("meta"):
        return families.build(PRESETS[name].config).train()


def _tokens() -> torch.Tensor:
    return torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")


# Every family and every variant of one; of the rest only the numbers differ.
@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("-tiny")] + ["opt-350m", "opt-175b", "xglm-4.5b"])
def test_forward_and_backward_of_the_full_square(name: str) -> None:
    model = _meta(name)
    with FlopCounterMode(display=False) as forward:
        logits = model(_tokens())
    expected = BATCH * LENGTH * model.config.forward_flops_per_token(LENGTH, causal=False)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * expected


def test_no_family_is_left_out() -> None:
    families = {type(preset.config) for preset in PRESETS.values()}
    assert families == {type(preset.config) for name, preset in PRESETS.items() if name.endswith("-tiny")}


@pytest.mark.parametrize("name", ["opt-tiny", "opt-350m", "opt-1.3b", "gpt-tiny", "xglm-564m"])
def test_causal_half_counted_query_by_query(name: str) -> None:
    """The counter reports full squares. A block fed one query against its t keys, for every t, executes the causal half
    and nothing more: so the real products are counted, and the closed form must equal their sum."""
    model = _meta(name)
    config = model.config
    attention = model.blocks[0].attention

    def one_query(keys: int) -> int:
        query = torch.empty(BATCH, config.heads, 1, attention.head_width, device="meta")
        table = query.expand(-1, -1, keys, -1)
        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.scaled_dot_product_attention(query, table, table)
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as whole:
        model(_tokens())
    counts = whole.get_flop_counts()["Global"]
    square = sum(number for operation, number in counts.items() if "bmm" in str(operation))
    causal = config.layers * sum(one_query(t + 1) for t in range(LENGTH))
    assert square == config.layers * one_query(LENGTH) * LENGTH
    exact = whole.get_total_flops() - square + causal
    assert exact == BATCH * LENGTH * config.forward_flops_per_token(LENGTH)


def test_recomputed_blocks_are_what_checkpointing_adds() -> None:
    model = _meta("opt-tiny")
    hidden = torch.empty(BATCH, LENGTH, model.config.width, device="meta")
    with FlopCounterMode(display=False) as counter:
        for block in model.blocks:
            hidden = block(hidden)
    assert counter.get_total_flops() == BATCH * LENGTH * model.config.block_flops_per_token(LENGTH, causal=False)
