"""Weights under our names and under Transformers': what differs between two families is a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from trireme_api.families import ModelConfig

from trireme_trainer.families import build
from trireme_trainer.families.convert.common import ConversionError, check_complete, cut_rows, pad_rows

_TOKENS = "embed_tokens.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
DECODER = {
    "attention.": "self_attn.",
    "attention_norm.": "self_attn_layer_norm.",
    "feed_forward.": "",
    "feed_forward_norm.": "final_layer_norm.",
}
"""Inside a block, as fairseq has it and Transformers' OPT and XGLM after it."""


@dataclass(frozen=True)
class Names:
    bare: str
    """What the model with an output layer puts before the names of the model without one."""
    outer: Mapping[str, str]
    """Our names outside blocks (whole, or all but `.weight` and `.bias`) → theirs."""
    layers: str
    """Their list of blocks."""
    inner: Mapping[str, str] = field(default_factory=lambda: DECODER)
    """Beginnings of our names inside a block → theirs; the first that fits counts."""
    tied: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": _TOKENS})
    """Their weights that are the same as another of ours."""
    head: str = "lm_head."
    """How their names outside the bare model begin."""
    rows: tuple[str, ...] = (_TOKENS,)
    """Our weights with one row per token."""

    def to_hugging_face(
        self, config: ModelConfig, state: Mapping[str, Tensor], vocabulary_size: int | None = None
    ) -> dict[str, Tensor]:
        check_complete(state, shapes(config))
        cut = {name: cut_rows(state[name], vocabulary_size, name) for name in self.rows}
        return {self.of(name): cut.get(name, weight) for name, weight in state.items()}

    def from_hugging_face(self, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs = {
            name if name.startswith(self.head) else self.bare + name.removeprefix(self.bare): weight
            for name, weight in state.items()
        }
        same = {name: theirs.pop(name) for name in self.tied if name in theirs}
        ours = {self.of(name): name for name in shapes(config)}
        out = {ours.get(name, name): weight for name, weight in theirs.items()}
        for name, weight in same.items():
            twin = self.tied[name]
            if twin in out and not torch.equal(weight, out[twin]):
                raise ConversionError(f"{name}: differs from {self.of(twin)}; {config.family} ties the two")
        for name in self.rows:
            if name in out:
                out[name] = pad_rows(out[name], config.vocabulary_size, name)
        check_complete(out, shapes(config))
        return out

    def of(self, name: str) -> str:
        """Their name of our weight."""
        block = _BLOCK.fullmatch(name)
        if block is None:
            if name in self.outer:
                return self.outer[name]
            module, _, kind = name.rpartition(".")
            return f"{self.outer[module]}.{kind}"
        number, inside = block.groups()
        for ours, theirs in self.inner.items():
            if inside.startswith(ours):
                return f"{self.layers}.{number}.{theirs}{inside.removeprefix(ours)}"
        raise ConversionError(f"{name}: not a weight of this family")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in build(config).named_parameters()}
