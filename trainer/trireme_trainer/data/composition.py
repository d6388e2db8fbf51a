"""What a mixture is made of: each source's language, weight and share, from the recipe and the corpora's manifests.

Opens no shard: `trireme validate` and `trireme run` ask before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trireme_api.mixture import MixtureSpec, weights
from trireme_api.recipe import DataSource
from trireme_api.schema import InvalidSpec

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import Manifest
from trireme_trainer.data.order import whole_counts


@dataclass(frozen=True)
class Part:
    """One source in a mixture."""

    path: str
    language: str | None
    tokens: int
    """Of its training split."""
    weight: float
    """As compared with the other sources'."""
    share: float
    """Of all blocks, exactly."""

    def told(self, blocks_per_epoch: int, blocks: int) -> dict[str, Any]:
        """For the step log: with how often its text is seen in a run of `blocks` blocks."""
        return {
            "path": self.path, "language": self.language, "tokens": self.tokens, "share": round(self.share, 6),
            "epochs": round(blocks * self.share / blocks_per_epoch, 4),
        }  # fmt: skip


def languages_of(sources: Sequence[DataSource], manifests: Sequence[Manifest]) -> list[str | None]:
    """By source: as the recipe says, or else the manifest. Raises DataError where they differ."""
    found: list[str | None] = []
    for i, (source, manifest) in enumerate(zip(sources, manifests, strict=True)):
        if source.language and manifest.language and source.language != manifest.language:
            raise DataError(
                f"data.sources[{i}].language: is {source.language}, but {source.path} was prepared as "
                f"{manifest.language}; correct it or leave it out"
            )
        found.append(source.language or manifest.language)
    return found


def check_tokenizers(sources: Sequence[DataSource], manifests: Sequence[Manifest]) -> None:
    """Raises DataError where sources differ in the one they were made with."""
    first = manifests[0].tokenizer
    for i, (source, manifest) in enumerate(zip(sources, manifests, strict=True)):
        if manifest.tokenizer.sha256 != first.sha256:
            there = sources[0].path
            raise DataError(
                f"data.sources[{i}].path: {source.path} was made with another tokenizer than {there}; prepare it again "
                f"with --tokenizer {there.rstrip('/')}/{first.file}"
            )


def compose(
    sources: Sequence[DataSource], manifests: Sequence[Manifest], spec: MixtureSpec | None
) -> list[Part]:
    """Raises DataError naming the field of the recipe."""
    check_tokenizers(sources, manifests)
    languages = languages_of(sources, manifests)
    tokens = [manifest.train.tokens for manifest in manifests]
    try:
        found = weights(spec, languages, tokens) if spec is not None else [source.weight for source in sources]
    except InvalidSpec as error:
        raise DataError(str(error)) from None
    counts = whole_counts(found)
    whole = sum(counts)
    return [
        Part(source.path, language, size, weight, count / whole)
        for source, language, size, weight, count in zip(sources, languages, tokens, found, counts, strict=True)
    ]
