"""Weights between a checkpoint root and a Transformers model directory, in this process alone."""

from __future__ import annotations

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
from trireme_trainer.families.convert import ConversionError, directory, tokenizers

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
    tokenizer: str | None = None
    """Where the model's own is now."""


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
    writing there meanwhile. `vocabulary_size` drops the rows that only pad the vocabulary. `tokenizer`: left out, the
    one that an imported checkpoint came with.

    Raises CheckpointError, ConversionError, OSError.
    """
    if output.exists() and any(output.iterdir()):
        raise ConversionError(f"{output}: is not empty; name a directory that is, or is not there yet")
    words = (str(tokenizer), tokenizer.read_bytes()) if tokenizer is not None else tokenizers.kept(CheckpointStore(uri))

    def check(found: ModelConfig) -> None:
        _check_rows(found, vocabulary_size)
        if words is not None:
            tokenizers.check(words[1], words[0], vocabulary_size or found.vocabulary_size)
            tokenizers.in_transformers(words[1], words[0], found)

    config, loaded_step, weights = read_checkpoint(uri, step, check)
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    files = directory.save(output, config, cast, vocabulary_size=vocabulary_size)
    own = tokenizers.write(words[1], words[0], output, config) if words is not None else []
    written = tuple(str(file) for file in files + own)
    return Exchange(config, loaded_step, config.parameters().total, written, str(own[0]) if own else None)


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
    """A model directory as the committed checkpoint of step 0: fp32 weights, fresh optimiser state; its tokenizer, if
    it has one, beside it in the root.

    Raises ConversionError, CheckpointError where there are checkpoints already, OSError.
    """
    store = CheckpointStore(uri)
    if store.exists() and store.candidates():
        raise CheckpointError(f"{store.files.path('')}: holds checkpoints already; name an empty or new directory")
    config, weights = directory.load(source, pad_vocabulary_to)
    words = tokenizers.find(source)
    content = words.read_bytes() if words is not None else b""
    encoder = tokenizers.check(content, str(words), config.vocabulary_size) if words is not None else None
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
    meta = _meta(config, source) | ({"tokenizer": encoder.sha256} if encoder is not None else {})
    checkpointer.save(0, state, meta)
    checkpointer.wait()
    committed = checkpointer.poll()
    checkpointer.close()
    own = tokenizers.keep(store, encoder, content) if encoder is not None else None
    return Exchange(config, 0, config.parameters().total, tuple(ref.path for ref in committed), own)


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
