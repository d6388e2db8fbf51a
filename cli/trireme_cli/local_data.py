"""What a recipe's data and checkpoint say before anything starts, as far as they lie on this machine: only manifests
are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trireme_api.anytime import Session, numbered
from trireme_api.families import resolve
from trireme_api.families.growing import GrowingConfig
from trireme_api.recipe import DataSource, Recipe
from trireme_api.schema import InvalidSpec

if TYPE_CHECKING:
    from trireme_trainer.data.manifest import Manifest


def look(recipe: Recipe, claims: Mapping[str, Path] = {}, here: bool = False) -> list[dict[str, Any]]:
    """A row for each source, as in the step log: language, tokens, share of the blocks, epochs; no rows where not all
    sources are prepared corpora on this machine, or with `anytime`. `claims`: where pvc://CLAIM lies; `here`: training
    runs on this machine, so that a local source must be there.

    Raises InvalidSpec for a source that is not there or too small, a vocabulary larger than the model's, and a mixture
    that cannot be made of these sources. With `anytime`: for each mega-batch that has arrived."""
    try:
        import trireme_trainer  # noqa: F401
    except ImportError:  # installed without the trainer
        return []
    if recipe.objective == "few-shot":
        return []
    if recipe.stream is None:
        return _look(recipe, claims, here)
    grown = 0
    for session in recipe.stream:
        arrived = recipe.of_session(session)
        if None in _manifests(arrived.data.sources, claims, here=False):
            break
        _look(arrived, claims, here)
        if session.growths > grown and isinstance(resolve(recipe.model), GrowingConfig):
            _check_held_out(recipe, session, claims)
        grown = session.growths
    return []


def _look(recipe: Recipe, claims: Mapping[str, Path], here: bool) -> list[dict[str, Any]]:
    from trireme_trainer.data.composition import compose
    from trireme_trainer.data.errors import DataError

    found = _manifests(recipe.data.sources, claims, here)
    manifests = [manifest for manifest in found if manifest is not None]
    if len(manifests) < len(found):
        return []  # where training runs they may be there; if not, the trainer says so
    rows, block = resolve(recipe.model).vocabulary_size, _block(recipe)
    for i, (source, manifest) in enumerate(zip(recipe.data.sources, manifests, strict=True)):
        if manifest.vocabulary > rows:
            raise InvalidSpec(
                f"data.sources[{i}].path",
                f"{source.path} is tokenised with {manifest.vocabulary} entries, the model has {rows}; set "
                f"model.overrides.vocabularySize to at least {manifest.vocabulary}, or prepare it with the model's "
                "tokenizer",
            )
        if manifest.train.tokens < block:
            raise InvalidSpec(
                f"data.sources[{i}].path",
                f"{source.path} has {manifest.train.tokens} tokens to train on, less than one block of {block}; give "
                "more text, or a shorter data.sequenceLength",
            )
    try:
        parts = compose(recipe.data.sources, manifests, recipe.data.mixture)
    except DataError as error:
        field, _, message = str(error).partition(": ")
        raise InvalidSpec(field, message) from None
    blocks = recipe.total_steps * recipe.sequences_per_step
    return [part.told(part.tokens // block, blocks) for part in parts]


def look_at_checkpoint(recipe: Recipe, uri: str, claims: Mapping[str, Path]) -> None:
    """Raises InvalidSpec where nothing here can write to `uri`, or where the newest checkpoint under it, if there is
    one on this machine that can be read, is of another model or was imported with another tokenizer; whether the rest
    of it fits, the trainer says."""
    try:
        from trireme_trainer.checkpoint import CheckpointError, CheckpointStore
        from trireme_trainer.checkpoint.same_run import MAY_CHANGE, check_model, check_tokenizer
        from trireme_trainer.lifecycle.outcome import TrainingEnd
        from trireme_trainer.storage import StorageError, check_driver, is_local
    except ImportError:
        return
    if not is_local(uri):
        try:
            check_driver(uri)
        except StorageError as error:
            raise InvalidSpec("checkpoint.uri", str(error)) from None
        return
    config = resolve(recipe.model)
    grows = {config.grown_by} if recipe.anytime is not None else set[str]()
    try:
        store = CheckpointStore(_here(uri, claims))
        for candidate in store.candidates()[:1] if store.exists() else []:
            manifest, _ = store.inspect(candidate)
            if manifest is not None:
                check_model(manifest.meta, config, candidate.path, MAY_CHANGE | grows)
                for corpus in _manifests(recipe.data.sources[:1], claims, here=False):
                    if corpus is not None and "imported" in manifest.meta:
                        check_tokenizer(manifest.meta, corpus.tokenizer.sha256, candidate.path)
    except (CheckpointError, StorageError):
        return  # the trainer tries again, and tells
    except TrainingEnd as error:
        field, _, message = str(error).partition(": ")
        raise InvalidSpec(field, message) from None


def _check_held_out(recipe: Recipe, session: Session, claims: Mapping[str, Path]) -> None:
    """What a model is grown by is measured on what the session's new mega-batches hold out."""
    new = [
        source.model_copy(update={"path": numbered(source.path, n)})
        for n in session.new
        for source in recipe.data.sources
    ]
    block = _block(recipe)
    if not any(manifest and manifest.valid.tokens >= block for manifest in _manifests(new, claims, here=False)):
        raise InvalidSpec(
            "data.sources",
            f"{new[-1].path} holds no block of {block} tokens out, on which growth measures usage; prepare it with "
            "--valid-fraction above 0",
        )


def _manifests(sources: Sequence[DataSource], claims: Mapping[str, Path], here: bool) -> list[Manifest | None]:
    """By source; None where it is not on this machine."""
    from trireme_trainer.data.errors import DataError
    from trireme_trainer.data.manifest import read_manifest
    from trireme_trainer.storage import StorageError, check_driver, is_local, resolve_path

    found: list[Manifest | None] = []
    for i, source in enumerate(sources):
        try:
            check_driver(source.path)
            found.append(read_manifest(resolve_path(_here(source.path, claims))))
        except (DataError, StorageError) as error:
            if here and (is_local(source.path) or isinstance(error, StorageError)):
                raise InvalidSpec(f"data.sources[{i}].path", str(error)) from None
            found.append(None)
    return found


def _block(recipe: Recipe) -> int:
    """Tokens; as objectives cut text: with the target of the last token, or behind the one that begins a sequence."""
    return recipe.data.sequence_length + (-1 if recipe.objective == "masked-lm" else 1)


def _here(path: str, claims: Mapping[str, Path]) -> str:
    claim, _, inside = path.removeprefix("pvc://").partition("/")
    return str(claims[claim] / inside) if path.startswith("pvc://") and claim in claims else path


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        language = f" ({row['language']})" if row["language"] else ""
        yield f"{row['path']}{language}: {row['share']:.4f} of the blocks, {row['epochs']:.2f} epochs"
