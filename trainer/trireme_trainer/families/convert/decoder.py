"""What Transformers' OPT and XGLM have in common: the names of a decoder's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from trireme_api.families import ModelConfig

from trireme_trainer.families import build
from trireme_trainer.families.convert.common import ConversionError, check_complete, cut_rows, pad_rows

_TOKENS = "embed_tokens.weight"
_TIED = "lm_head.weight"
_INNER = {
    "attention.": "self_attn.",
    "attention_norm.": "self_attn_layer_norm.",
    "feed_forward.": "",
    "feed_forward_norm.": "final_layer_norm.",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Names:
    prefix: str
    """Of every weight of the causal language model but the output layer; the bare model leaves out its `model.`."""
    outer: Mapping[str, str]
    """Our modules outside blocks → theirs, where the two differ."""

    def to_hugging_face(
        self, config: ModelConfig, state: Mapping[str, Tensor], vocabulary_size: int | None = None
    ) -> dict[str, Tensor]:
        check_complete(state, shapes(config))
        out = {self.of(name): weight for name, weight in state.items()}
        out[self.prefix + _TOKENS] = cut_rows(out[self.prefix + _TOKENS], vocabulary_size, _TOKENS)
        return out

    def from_hugging_face(self, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs = {name if name == _TIED else "model." + name.removeprefix("model."): w for name, w in state.items()}
        head = theirs.pop(_TIED, None)
        ours = {self.of(name): name for name in shapes(config)}
        out = {ours.get(name, name): weight for name, weight in theirs.items()}
        if _TOKENS in out:
            if head is not None and not torch.equal(head, out[_TOKENS]):
                raise ConversionError(f"{_TIED}: differs from the token table; {config.family} ties the two")
            out[_TOKENS] = pad_rows(out[_TOKENS], config.vocabulary_size, _TOKENS)
        check_complete(out, shapes(config))
        return out

    def of(self, name: str) -> str:
        """Their name of our weight."""
        block = _BLOCK.fullmatch(name)
        if block is None:
            module, _, kind = name.partition(".")
            return f"{self.prefix}{self.outer.get(module, module)}.{kind}"
        number, inner = block.groups()
        for ours, theirs in _INNER.items():
            if inner.startswith(ours):
                return f"{self.prefix}layers.{number}.{theirs}{inner.removeprefix(ours)}"
        raise ConversionError(f"{name}: not a weight of a decoder")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in build(config).named_parameters()}
