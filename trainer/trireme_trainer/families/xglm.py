"""XGLM (arXiv 2112.10668): the GPT family's network with the initial values of its released configuration."""

from __future__ import annotations

from trireme_api.families.transformer import PAD_TOKEN
from trireme_api.families.xglm import XglmConfig

from trireme_trainer.families.gpt import GptModel
from trireme_trainer.layers.init import Constant, InitialValue, Normal


class XglmModel(GptModel):
    def __init__(self, config: XglmConfig) -> None:
        super().__init__(config)
        self._initial_std = config.initial_std

    def initial_value(self, name: str) -> InitialValue:
        """N(0, 0.02²) throughout, biases and the padding row zero (`init_std` of the released configurations)."""
        known = super().initial_value(name)
        if isinstance(known, Constant) or name.endswith(".bias"):
            return known if isinstance(known, Constant) else Constant(0.0)
        return Normal(self._initial_std, zero_row=PAD_TOKEN if name == "embed_tokens.weight" else None)
