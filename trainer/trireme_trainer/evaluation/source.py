"""A model to evaluate, whole, in this process: of a committed checkpoint or a Transformers directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from trireme_api.families import ModelConfig
from trireme_api.masking import MaskingSpec

from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.exchange import read_checkpoint, read_meta
from trireme_trainer.data.tokenizer import Encoder, open_encoder
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.families.convert import directory, tokenizers


@dataclass(frozen=True)
class Source:
    model: LanguageModel
    config: ModelConfig
    step: int | None
    """Of a checkpoint."""
    encoder: Encoder | None
    masking: MaskingSpec
    """Of a masked model: what it was trained with, or the defaults where that is not known."""


def load(
    where: str, step: int | None, tokenizer: Path | None, dtype: torch.dtype, device: torch.device, tasks: bool = False
) -> Source:
    """`tasks`: it is to answer some. Raises CheckpointError, ConversionError, DataError, OSError. A checkpoint takes no
    fence: its job may be running."""

    def check(config: ModelConfig) -> None:
        if tasks and not config.causal:
            raise EvaluationError(
                f"{where}: {config.family} sees both sides of a token, so a continuation has no likelihood of its own; "
                "leave out --task and give --data, for the perplexity of hidden tokens"
            )

    path = Path(where)
    loaded_step, masking = None, MaskingSpec()
    if (path / "config.json").is_file():
        if step is not None:
            raise EvaluationError(f"{where}: --step is of checkpoints, this is a Transformers directory; leave it out")
        # Rows that only pad the table would take a share of the probability.
        config, weights = directory.load(path, pad_vocabulary_to=1)
        check(config)
        own = tokenizers.find(path)
        words = (str(own), own.read_bytes()) if own is not None else None
    else:
        config, loaded_step, weights = read_checkpoint(where, step, check)
        store = CheckpointStore(where)
        _, meta = read_meta(store, loaded_step)
        words = tokenizers.kept(store)
        masking = MaskingSpec.model_validate((meta.get("data") or {}).get("masking") or {})
    with torch.device("meta"):
        model = build(config)
    weights = {name: weight.to(device=device, dtype=dtype) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    if tokenizer is not None:
        words = str(tokenizer), tokenizer.read_bytes()
    encoder = open_encoder(words[1], words[0]) if words is not None else None
    return Source(model, config, loaded_step, encoder, masking)
