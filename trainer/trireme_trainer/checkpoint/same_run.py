"""Whether a checkpoint that was found belongs to this recipe. Needs no torch: `trireme run` asks before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydantic.alias_generators import to_camel
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.lifecycle.outcome import BadData, BadRecipe

if TYPE_CHECKING:
    from trireme_trainer.objectives.base import Samples

MAY_CHANGE = frozenset({"dropout", "attention_dropout"})
"""Numbers of a model that another run of it may set otherwise: no weight depends on them."""


def check_model(
    meta: Mapping[str, Any], config: ModelConfig, path: str, may_change: Collection[str] = MAY_CHANGE
) -> None:
    """Raises BadRecipe, naming what differs, where the weights under `path` are of another model."""
    saved = meta.get("model", {})
    now = {"family": config.family, **config.model_dump()}
    changed = [
        f"{to_camel(name)} was {saved[name]}, is {value}"
        for name, value in now.items()
        if name not in may_change and name in saved and saved[name] != value
    ]
    if changed:
        raise BadRecipe(
            f"model: {path} is of another model ({'; '.join(changed)}); restore it, or use another checkpoint.uri"
        )


def check_tokenizer(meta: Mapping[str, Any], sha256: str | None, path: str) -> None:
    """Raises BadData where imported weights came with another tokenizer than the data were made with (None: with
    none)."""
    own = meta.get("tokenizer")
    if own is not None and own != sha256:
        raise BadData(
            f"data.sources[0].path: made with another tokenizer than the weights of {path} were; prepare it with "
            "--tokenizer FILE of the one beside that checkpoint"
        )


def check_same_run(
    meta: Mapping[str, Any], recipe: Recipe, config: ModelConfig, samples: Samples, path: str, *, new_data: bool = False
) -> None:
    """Raises BadRecipe or BadData, naming the fields, where going on from this checkpoint would not be the same run.
    `new_data`: a session of other mega-batches begins with it."""
    check_model(meta, config, path)
    if "imported" in meta:  # weights alone: no batch was trained and no sample read yet
        check_tokenizer(meta, samples.tokenizer, path)
        return
    if meta.get("batchTokens") != recipe.batch.tokens:
        raise BadRecipe(
            f"batch.tokens: was {meta.get('batchTokens')} when {path} was written, is {recipe.batch.tokens}: the "
            "position in the data would move; restore it, or use another checkpoint.uri"
        )
    if "grown" in meta or new_data:
        return  # the first of a new session: its data are those of another mega-batch
    moved = samples.changes_since(meta.get("data", {}))
    if moved:
        raise BadData(
            f"data: {'; '.join(moved)} since {path} was written, so the order of samples is another; restore it, or "
            "use another checkpoint.uri"
        )
