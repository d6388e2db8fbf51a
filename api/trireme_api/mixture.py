"""How much of each language is trained on, from how much text there is of it. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from trireme_api.schema import InvalidSpec, PositiveFloat, Spec

LANGUAGE = re.compile(r"^[A-Za-z0-9]+([-_][A-Za-z0-9]+)*$")
Language = Annotated[str, Field(min_length=1, max_length=35, pattern=LANGUAGE.pattern)]
"""A tag such as sw, pt-BR or zh_Hans."""


class MixtureSpec(Spec):
    """Shares of the sources from the training tokens that each language has, in place of their weights. Sources of one
    language share by their tokens; one without a language is a language of its own."""

    alpha: float | None = Field(default=None, ge=0, le=1)
    """A language of n tokens is drawn in proportion to n to this power (XLM-R XL, 2105.00572: 0.3). 1: as much as there
    is of each; 0: all alike."""
    upsample: dict[Language, PositiveFloat] | None = Field(default=None, min_length=1, max_length=256)
    """A language's tokens count so many times, those of others once (XGLM, 2112.10668: 1, 2, 10 and 100)."""

    @model_validator(mode="after")
    def _one(self) -> MixtureSpec:
        if (self.alpha is None) == (self.upsample is None):
            raise ValueError("give either alpha or upsample")
        return self


def check_languages(spec: MixtureSpec, languages: Sequence[str | None], path: str = "") -> None:
    """Raises InvalidSpec for a language to up-sample that no source has. `path`: where the recipe stands."""
    known = sorted({name for name in languages if name is not None})
    for name in spec.upsample or {}:
        if name not in known:
            there = f"they have {', '.join(known)}" if known else "none has a language"
            raise InvalidSpec(
                f"{path}data.mixture.upsample.{name}",
                f"no source has this language, {there}; set the language of one, or prepare it with --language {name}",
            )


def weights(spec: MixtureSpec, languages: Sequence[str | None], tokens: Sequence[int]) -> list[float]:
    """By source, to be normalised. Raises InvalidSpec for a language to up-sample that no source has."""
    check_languages(spec, languages)
    if spec.upsample is not None:
        times = [spec.upsample.get(name, 1.0) if name is not None else 1.0 for name in languages]
        return [size * factor for size, factor in zip(tokens, times, strict=True)]
    assert spec.alpha is not None
    groups = [name if name is not None else i for i, name in enumerate(languages)]
    totals = dict.fromkeys(groups, 0)
    for group, size in zip(groups, tokens, strict=True):
        totals[group] += size
    whole = sum(tokens)
    # Nine digits: the last bits of a power are not the same on every machine, and the order of samples must be.
    return [
        float(f"{(totals[group] / whole) ** spec.alpha * size / totals[group]:.9g}")
        for group, size in zip(groups, tokens, strict=True)
    ]
