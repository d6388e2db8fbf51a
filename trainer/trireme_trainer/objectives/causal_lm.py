"""Next-token prediction: every position has a target, and its logits."""

from __future__ import annotations

from torch import Tensor

from trireme_trainer.families import LanguageModel
from trireme_trainer.objectives.cross_entropy import IGNORED, ChunkedCrossEntropy

__all__ = ["IGNORED", "CausalLM"]


class CausalLM(ChunkedCrossEntropy):
    """Callable `(model, tokens_BT, targets_BT, valid) -> loss`, shape [], fp32."""

    def __call__(
        self, model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, valid: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        return self.loss(model, tokens_BT, targets_BT.flatten(), valid, scale)
