"""Weights between a checkpoint root and a Transformers model directory, in this process alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trireme_api.families import ModelConfig, restore, specify
from trireme_api.schema import InvalidSpec

from trireme_trainer.checkpoint import Checkpointer, CheckpointError, CheckpointStore
from trireme_trainer.checkpoint.loader import load_newest
from trireme_trainer.checkpoint.ranks import Ranks
from trireme_trainer.checkpoint.state import flatten
from trireme_trainer.families import build
from trireme_trainer.families.convert import ConversionError, directory

OWNER = "imported"
"""Holds the fence of an imported root until a job takes it over."""


@dataclass(frozen=True)
class Exchange:
    """What was carried over."""

    config: ModelConfig
    step: int
    parameters: int
    paths: tuple[str, ...]
    """Checkpoint or weight files written."""


def to_hugging_face(
    uri: str,
    output: Path,
    *,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    vocabulary_size: int | None = None,
    tokenizer: Path | None = None,
) -> Exchange:
    """The newest good checkpoint under `uri`, or the one of `step`, as a model directory. Takes no fence: a job may be
    writing there meanwhile. `vocabulary_size` drops the rows that only pad the vocabulary.

    Raises CheckpointError, ConversionError, OSError.
    """
    if output.exists() and any(output.iterdir()):
        raise ConversionError(f"{output}: is not empty; name a directory that is, or is not there yet")
    config, loaded_step, weights = read_checkpoint(uri, step, lambda found: _check_rows(found, vocabulary_size))
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    files = directory.save(output, config, cast, vocabulary_size=vocabulary_size)
    if tokenizer is not None:
        files += _save_tokenizer(tokenizer, output)
    return Exchange(config, loaded_step, config.parameters().total, tuple(str(file) for file in files))


def read_checkpoint(
    uri: str, step: int | None = None, check: Callable[[ModelConfig], None] = lambda _: None
) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """(model, step, whole fp32 weights) of the newest good checkpoint under `uri`, or of the one of `step`. Takes no
    fence. `check` may refuse the model before its weights are read.

    Raises CheckpointError, ConversionError.
    """
    store = CheckpointStore(uri)
    config = describe(store, step)
    check(config)
    weights = empty_weights(config)
    return config, load_into(store, step, {"model": weights}), weights


def load_into(store: CheckpointStore, step: int | None, state: Mapping[str, Any]) -> int:
    """Reads that part of the newest good checkpoint, or of the one of `step`, into the tensors of `state`. Returns its
    step. Raises CheckpointError."""
    loaded = load_newest(store, Ranks(), flatten(state), strict=False, at_most=step)
    if loaded is None or (step is not None and loaded.step != step):
        raise CheckpointError(f"{store.files.path('')}: the checkpoint of step {step} is not usable")
    return loaded.step


def _check_rows(config: ModelConfig, vocabulary_size: int | None) -> None:
    if vocabulary_size is not None and not 0 < vocabulary_size <= config.vocabulary_size:
        raise ConversionError(f"--vocabulary: must be 1 to {config.vocabulary_size}, the rows of the token table")


def from_hugging_face(source: Path, uri: str, pad_vocabulary_to: int = 8) -> Exchange:
    """A model directory as the committed checkpoint of step 0: fp32 weights, fresh optimiser state.

    Raises ConversionError, CheckpointError where there are checkpoints already, OSError.
    """
    store = CheckpointStore(uri)
    if store.exists() and store.candidates():
        raise CheckpointError(f"{store.files.path('')}: holds checkpoints already; name an empty or new directory")
    config, weights = directory.load(source, pad_vocabulary_to)
    model = {name: weight.to(torch.float32).contiguous() for name, weight in weights.items()}
    state = {
        "model": model,
        "optimizer": {
            "exp_avg": {name: torch.zeros_like(weight) for name, weight in model.items()},
            "exp_avg_sq": {name: torch.zeros_like(weight) for name, weight in model.items()},
            "step": torch.zeros((), dtype=torch.float32),
        },
    }
    checkpointer = Checkpointer(store, attempt=0, owner=OWNER)
    checkpointer.save(0, state, _meta(config, source))
    checkpointer.wait()
    committed = checkpointer.poll()
    checkpointer.close()
    return Exchange(config, 0, config.parameters().total, tuple(ref.path for ref in committed))


def _meta(config: ModelConfig, source: Path) -> dict[str, Any]:
    return {
        "step": 0,
        "tokens": 0,
        "imported": str(source.resolve()),
        "model": {"family": config.family, "preset": specify(config).preset, **config.model_dump()},
    }


def describe(store: CheckpointStore, step: int | None) -> ModelConfig:
    """The model of the newest checkpoint, or of the one of `step`. Raises CheckpointError, ConversionError."""
    path, meta = read_meta(store, step)
    model = meta.get("model")
    if not isinstance(model, Mapping):
        raise ConversionError(f"{path}: does not say which model it is of; is it your script's?")
    try:
        return restore(model)
    except InvalidSpec as error:
        raise ConversionError(f"{path}: {error}") from None


def read_meta(store: CheckpointStore, step: int | None) -> tuple[str, Mapping[str, Any]]:
    """(path, meta) of the newest checkpoint whose manifest can be read, or of the one of `step`. Raises
    CheckpointError."""
    where = store.files.path("")
    candidates = [c for c in store.candidates() if step is None or c.step == step] if store.exists() else []
    if not candidates:
        what = "no committed checkpoint here" if step is None else f"no committed checkpoint of step {step}"
        raise CheckpointError(f"{where}: {what}; see: trireme checkpoints list {store.uri}")
    problems = []
    for candidate in candidates:
        manifest, problem = store.inspect(candidate)
        if manifest is None:
            problems.append(str(problem))
            continue
        return candidate.path, manifest.meta
    raise CheckpointError("; ".join(problems))


def empty_weights(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in build(config).named_parameters()}
    return {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}


def _save_tokenizer(tokenizer: Path, output: Path) -> list[Path]:
    target, settings = output / "tokenizer.json", output / "tokenizer_config.json"
    text = tokenizer.read_text(encoding="utf-8")
    try:
        added = json.loads(text).get("added_tokens", [])
    except (ValueError, AttributeError):
        raise ConversionError(f"{tokenizer}: not a tokenizer.json") from None
    known = {entry.get("content") for entry in added}
    special = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    target.write_text(text, encoding="utf-8")
    names = {kind: token for kind, token in special.items() if token in known}
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2) + "\n")
    return [target, settings]
