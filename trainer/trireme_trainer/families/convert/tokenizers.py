"""The tokenizer that goes with weights: in a Transformers directory, and in the root of an imported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from trireme_api.families import ModelConfig
from trireme_api.families.xglm import XglmConfig
from trireme_api.families.xlmr import XlmrConfig

from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import SENTENCE_PIECES, TOKENIZER
from trireme_trainer.data.tokenizer import Encoder, is_json, open_encoder
from trireme_trainer.families.convert.common import ConversionError

BPE_MODEL = "sentencepiece.bpe.model"
_SPECIAL = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def find(directory: Path) -> Path | None:
    """The tokenizer of a Transformers directory. A SentencePiece model before the tokenizer.json that was made of it:
    its ids are those that the model was trained with, everywhere."""
    return next((directory / name for name in (BPE_MODEL, TOKENIZER) if (directory / name).is_file()), None)


def check(content: bytes, where: str, rows: int) -> Encoder:
    """Raises ConversionError for what is no tokenizer, or has more entries than the token table has `rows`."""
    try:
        encoder = open_encoder(content, where)
    except DataError as error:
        raise ConversionError(str(error)) from None
    if encoder.vocabulary > rows:
        raise ConversionError(
            f"{where}: has {encoder.vocabulary} entries, the model's token table {rows} rows; give the tokenizer that "
            "the model was trained with"
        )
    return encoder


def keep(store: CheckpointStore, encoder: Encoder, content: bytes) -> str:
    """In the root, by the name a corpus calls it. Returns its path."""
    store.files.replace("", encoder.file, content)
    return store.files.path(encoder.file)


def kept(store: CheckpointStore) -> tuple[str, bytes] | None:
    """(path, content) of what `keep` put there."""
    for name in (SENTENCE_PIECES, TOKENIZER):
        try:
            with store.files.open_read("", name) as file:
                return store.files.path(name), file.read()
        except FileNotFoundError:
            continue
    return None


def in_transformers(content: bytes, where: str, config: ModelConfig) -> tuple[str, dict[str, str]]:
    """(name, tokenizer_config.json) that it has there. Raises ConversionError for a SentencePiece model of a family
    whose ids it does not know there."""
    if is_json(content):
        known = {entry.get("content") for entry in json.loads(content).get("added_tokens", [])}
        tokens = {kind: token for kind, token in _SPECIAL.items() if token in known}
        return TOKENIZER, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    if isinstance(config, XglmConfig | XlmrConfig):
        # Transformers 5 reads no SentencePiece model as XGLMTokenizer (all ids are <unk>); this class has the same ids.
        return BPE_MODEL, {"tokenizer_class": "XLMRobertaTokenizer"}
    raise ConversionError(
        f"{where}: Transformers reads SentencePiece models with fairseq's ids for xglm and xlmr, not for "
        f"{config.family}; leave it out"
    )


def write(content: bytes, where: str, directory: Path, config: ModelConfig) -> list[Path]:
    """As Transformers reads it."""
    name, settings = in_transformers(content, where, config)
    target, told = directory / name, directory / "tokenizer_config.json"
    target.write_bytes(content)
    told.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return [target, told]
