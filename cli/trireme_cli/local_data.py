"""What a recipe's data say before anything starts, as far as they lie on this machine: only manifests are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trireme_api.families import resolve
from trireme_api.recipe import Recipe
from trireme_api.schema import InvalidSpec

if TYPE_CHECKING:
    from trireme_trainer.data.manifest import Manifest


def look(recipe: Recipe, claims: Mapping[str, Path] = {}) -> list[dict[str, Any]]:
    """A row for each source, as in the step log: language, tokens, share of the blocks, epochs; no rows where not all
    sources are prepared corpora on this machine (`claims`: where pvc://CLAIM lies). Raises InvalidSpec for a vocabulary
    larger than the model's, and for a mixture that cannot be made of these sources."""
    try:
        from trireme_trainer.data.composition import compose
        from trireme_trainer.data.errors import DataError
        from trireme_trainer.data.manifest import read_manifest
        from trireme_trainer.storage import StorageError, resolve_path
    except ImportError:  # installed without the trainer
        return []
    manifests: list[Manifest] = []
    for source in recipe.data.sources:
        try:
            manifests.append(read_manifest(resolve_path(_here(source.path, claims))))
        except (DataError, StorageError):
            return []  # where training runs it may be there; if not, the trainer says so
    rows = resolve(recipe.model).vocabulary_size
    for i, (source, manifest) in enumerate(zip(recipe.data.sources, manifests, strict=True)):
        if manifest.vocabulary > rows:
            raise InvalidSpec(
                f"data.sources[{i}].path",
                f"{source.path} is tokenised with {manifest.vocabulary} entries, the model has {rows}; set "
                f"model.overrides.vocabularySize to at least {manifest.vocabulary}, or prepare it with the model's "
                "tokenizer",
            )
    try:
        parts = compose(recipe.data.sources, manifests, recipe.data.mixture)
    except DataError as error:
        field, _, message = str(error).partition(": ")
        raise InvalidSpec(field, message) from None
    # As objectives cut text: with the target of the last token, or behind the token that begins a sequence.
    block = recipe.data.sequence_length + (-1 if recipe.objective == "masked-lm" else 1)
    blocks = recipe.total_steps * recipe.sequences_per_step
    return [part.told(max(1, part.tokens // block), blocks) for part in parts]


def _here(path: str, claims: Mapping[str, Path]) -> str:
    claim, _, inside = path.removeprefix("pvc://").partition("/")
    return str(claims[claim] / inside) if path.startswith("pvc://") and claim in claims else path


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        language = f" ({row['language']})" if row["language"] else ""
        yield f"{row['path']}{language}: {row['share']:.4f} of the blocks, {row['epochs']:.2f} epochs"
