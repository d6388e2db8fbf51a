"""A Transformers model directory: `config.json` and weights, in safetensors shards or older pickled ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trireme_api.families import ModelConfig

from trireme_trainer.families.convert import (
    ConversionError,
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    to_hugging_face,
)

SHARD_BYTES = 5 * 10**9


def load(directory: Path, pad_vocabulary_to: int = 8) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict under our names, in the precision they are stored in.

    Raises ConversionError for a directory that is not a whole model, OSError where it cannot be read.
    """
    if not (directory / "config.json").is_file():
        raise ConversionError(f"{directory}: no config.json here; name a local Transformers model directory")
    config = config_from_hugging_face(_read_json(directory / "config.json"), pad_vocabulary_to)
    state: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        state.update(_read_weights(file))
    return config, from_hugging_face(config, state)


def save(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    vocabulary_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes `config.json` and safetensors shards of at most `shard_bytes` (one weight at least); returns their paths.

    Raises ConversionError for weights that do not fit `config`, OSError where the directory cannot be written.
    """
    theirs = to_hugging_face(config, state, vocabulary_size)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(theirs, shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: weight.contiguous() for key, weight in shard.items()}, directory / name, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(w.nbytes for w in theirs.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        _write_json(directory / "model.safetensors.index.json", index)
    dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
    _write_json(directory / "config.json", {**config_to_hugging_face(config, vocabulary_size), "torch_dtype": dtype})
    return [directory / name for name in names]


def _shards(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in state.items():
        if shards[-1] and size + weight.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _weight_files(directory: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{stem}.index.json"
        if index.exists():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            if any(Path(name).name != name for name in names):
                raise ConversionError(f"{index}: names a file outside the directory")
            return [directory / name for name in names]
        if (directory / stem).exists():
            return [directory / stem]
    raise ConversionError(f"{directory}: no model.safetensors or pytorch_model.bin, whole or with an index")


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise ConversionError(f"{file}: named in the index but not there")
    if file.suffix == ".safetensors":
        return load_file(file)
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: expected an object")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
