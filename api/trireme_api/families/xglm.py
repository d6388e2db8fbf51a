"""XGLM (arXiv 2112.10668): multilingual decoders of 564M to 7.5B parameters.

Shapes: fairseq examples/xglm/README.md; numbers of heads: released configurations. The paper's text was not to be had,
and no public source states learning rate, batch or warm-up: what `recipe` says of them is this project's choice, after
GPT-3 models of the same shape.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trireme_api.families.base import MEBI, Preset, PublishedRecipe
from trireme_api.families.gpt import GptConfig
from trireme_api.schema import PositiveFloat


class XglmConfig(GptConfig):
    """Built like the GPT family; a vocabulary of many languages, and initial values of one width throughout."""

    family: ClassVar[str] = "xglm"

    vocabulary_size: int = Field(default=256008, ge=4)
    """4 specials, 255,997 SentencePiece pieces, 7 unused."""
    initial_std: PositiveFloat = 0.02


def _preset(
    name: str, layers: int, width: int, feed_forward_width: int, heads: int, learning_rate: float, note: str = ""
) -> Preset:
    config = XglmConfig(layers=layers, width=width, feed_forward_width=feed_forward_width, heads=heads)
    return Preset(name=name, config=config, recipe=_recipe(learning_rate), note=note)


def _recipe(learning_rate: float) -> PublishedRecipe:
    return PublishedRecipe(
        peak_learning_rate=learning_rate, batch_tokens=1 * MEBI, warmup_tokens=2000 * MEBI, decay_tokens=500e9,
        clip=0.0, betas=(0.9, 0.98), weight_decay=0.01, final_fraction=0.0,
        source="500B tokens, sequences of 2048: model card; everything else chosen here, no source states it",
    )  # fmt: skip


_TINY = XglmConfig(layers=2, width=64, heads=2, vocabulary_size=512, maximum_positions=256)

PRESETS = (
    Preset("xglm-tiny", _TINY, _recipe(1e-3), "for tests; not a size of the paper"),
    _preset("xglm-564m", 24, 1024, 4096, 16, 3.0e-4),
    _preset("xglm-1.7b", 24, 2048, 8192, 16, 2.0e-4),
    _preset("xglm-2.9b", 48, 2048, 8192, 16, 1.6e-4),
    _preset("xglm-4.5b", 48, 2048, 16384, 16, 1.6e-4, note="134 languages; the other sizes 30"),
    _preset("xglm-7.5b", 32, 4096, 16384, 32, 1.2e-4),
)
