"""Model families: presets by name, and their arithmetic in closed form. No torch.

A family is one module that subclasses `ModelConfig` (transformers: `TransformerConfig`) and lists its `PRESETS`; it is
entered in `_FAMILIES` below.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from trireme_api.families import ensemble, gmlp, gpt, growing, moe, normformer, opt, smlp, xglm, xlmr
from trireme_api.families.base import ModelConfig, ParameterCount, Preset, PublishedRecipe
from trireme_api.families.mixture import MixtureConfig
from trireme_api.families.transformer import TransformerConfig
from trireme_api.recipe import ModelSpec, Recipe
from trireme_api.schema import InvalidSpec, problems

__all__ = [
    "PRESETS", "ModelConfig", "ParameterCount", "Preset", "PublishedRecipe", "check_recipe", "forward_flops_per_token",
    "palm_flops_per_token", "parameters", "resolve", "restore", "specify",
]

_FAMILIES = (opt, gpt, moe, xglm, xlmr, normformer, growing, ensemble, gmlp, smlp)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {preset.name: preset for family in _FAMILIES for preset in family.PRESETS}
)


def resolve(spec: ModelSpec, path: str = "model") -> ModelConfig:
    """The preset with its overrides applied. `path` is where the model stands in the user's YAML.

    Raises InvalidSpec naming the field: unknown preset or override (with the nearest known name), value out of range.
    """
    preset = PRESETS.get(spec.preset)
    if preset is None:
        near = difflib.get_close_matches(spec.preset, list(PRESETS), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidSpec(f"{path}.preset", f"unknown preset {spec.preset!r}; {hint}`trireme models` lists all")
    kind = type(preset.config)
    names = [field.alias or name for name, field in kind.model_fields.items()]
    for name in spec.overrides:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
            raise InvalidSpec(f"{path}.overrides.{name}", f"unknown override of {spec.preset}; {hint}")
    # Only what the preset states itself: widths that follow from another (4·d) follow the overridden one too.
    stated = preset.config.model_dump(by_alias=True, exclude_unset=True)
    try:
        return kind.model_validate({**stated, **spec.overrides}, strict=True)
    except ValidationError as error:
        first = problems(error, names, f"{path}.overrides.")[0]
        raise InvalidSpec(first.field.rstrip("."), first.message) from None


def restore(saved: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a checkpoint's `meta.model` describes. Raises InvalidSpec where nothing here builds it."""
    kinds = {type(preset.config).family: type(preset.config) for preset in PRESETS.values()}
    kind = kinds.get(str(saved.get("family")))
    if kind is None:
        raise InvalidSpec("model.family", f"unknown family {saved.get('family')!r}; known: {', '.join(kinds)}")
    try:
        return kind.model_validate({name: value for name, value in saved.items() if name in kind.model_fields})
    except ValidationError as error:
        first = problems(error, list(kind.model_fields), "model.")[0]
        raise InvalidSpec(first.field, first.message) from None


def specify(config: ModelConfig) -> ModelSpec:
    """What to write under `model` in a recipe to get this configuration: the nearest preset, and the differences."""

    def differences(preset: Preset) -> dict[str, int | float | bool | str]:
        theirs = preset.config.model_dump(by_alias=True)
        return {name: value for name, value in config.model_dump(by_alias=True).items() if theirs[name] != value}

    same_family = [preset for preset in PRESETS.values() if type(preset.config) is type(config)]
    nearest = min(same_family, key=lambda preset: len(differences(preset)))
    return ModelSpec(preset=nearest.name, overrides=differences(nearest))


def check_recipe(recipe: Recipe, path: str = "") -> ModelConfig:
    """Resolves the recipe's model and checks what depends on both: the sequence must fit the position table, and
    the objective what a token sees."""
    config = resolve(recipe.model, f"{path}model")
    if recipe.data.sequence_length > config.maximum_positions:
        raise InvalidSpec(
            f"{path}data.sequenceLength",
            f"must be at most {config.maximum_positions}, the positions of {recipe.model.preset}, got "
            f"{recipe.data.sequence_length}; or set {path}model.overrides.maximumPositions",
        )
    if not config.causal and recipe.objective != "masked-lm":
        raise InvalidSpec(
            f"{path}objective",
            f"must be masked-lm for {recipe.model.preset}, which sees both sides of a token, the next one included; "
            f"got {recipe.objective}",
        )
    if config.causal and recipe.objective == "masked-lm":
        both = ", ".join(preset.name for preset in PRESETS.values() if not preset.config.causal)
        raise InvalidSpec(
            f"{path}objective",
            f"masked-lm needs a model that sees both sides of a token and {recipe.model.preset} does not; set "
            f"causal-lm, or one of these as {path}model.preset: {both}",
        )
    if recipe.compile and isinstance(config, MixtureConfig) and config.capacity == "dropless":
        raise InvalidSpec(
            f"{path}compile",
            f"not with dropless experts, whose shapes follow the data; set {path}model.overrides.capacity: limited",
        )
    if recipe.anytime is not None and recipe.anytime.grow_every and not config.grows:
        able = ", ".join(preset.name for preset in PRESETS.values() if preset.config.grows)
        raise InvalidSpec(
            f"{path}anytime.growEvery", f"{recipe.model.preset} cannot grow; set 0, or one of these as preset: {able}"
        )
    if isinstance(config, ensemble.EnsembleConfig):
        _check_ensemble(recipe, config, path)
    _check_experts(recipe, config, path)
    _check_tensor(recipe, config, path)
    return config


def _check_ensemble(recipe: Recipe, config: ensemble.EnsembleConfig, path: str) -> None:
    preset = recipe.model.preset
    if recipe.objective != "causal-lm":
        raise InvalidSpec(
            f"{path}objective", f"must be causal-lm for {preset}, an ensemble; got {recipe.objective}"
        )
    if config.grows and config.members > 1:
        raise InvalidSpec(
            f"{path}model.overrides.members",
            f"must be 1 for {preset}, whose newest member alone is trained: {config.members - 1} would stay as they "
            f"were drawn; {path}anytime.growEvery adds the others, or set {path}model.overrides.trains: all",
        )


def _check_experts(recipe: Recipe, config: ModelConfig, path: str) -> None:
    ranks = recipe.parallelism.expert
    if ranks == 1:
        return
    experts = getattr(config, "experts", None)
    if experts is None:
        mixed = ", ".join(preset.name for preset in PRESETS.values() if hasattr(preset.config, "experts"))
        raise InvalidSpec(
            f"{path}parallelism.expert",
            f"must be 1 for {recipe.model.preset}, which has no experts; those with: {mixed}",
        )
    if experts % ranks:
        raise InvalidSpec(
            f"{path}parallelism.expert",
            f"must divide the {experts} experts of {recipe.model.preset}, got {ranks}; set a divisor, or another "
            f"{path}model.overrides.experts",
        )


def _check_tensor(recipe: Recipe, config: ModelConfig, path: str) -> None:
    ranks, preset = recipe.parallelism.tensor, recipe.model.preset
    if ranks == 1:
        return
    where = f"{path}parallelism.tensor"
    if recipe.parallelism.expert > 1:
        raise InvalidSpec(
            where,
            f"{ranks} goes not with {path}parallelism.expert: {recipe.parallelism.expert}; tensor shares out experts "
            "too, set one of both to 1",
        )
    if not isinstance(config, TransformerConfig) or config.grown_by:
        divisible = isinstance(config, TransformerConfig)
        why = "has no attention heads to divide" if not divisible else "grows" if config.grows else "is an ensemble"
        instead = f"share the experts out with {path}parallelism.expert" if hasattr(config, "experts") else "use shard"
        raise InvalidSpec(where, f"must be 1 for {preset}, which {why}; {instead}")
    numbers = {"heads": config.heads, "feedForwardWidth": config.feed_forward_width}
    if isinstance(config, MixtureConfig):
        numbers["experts"] = config.experts
    for name, number in numbers.items():
        if number % ranks:
            fitting = max(n for n in range(1, ranks) if math.gcd(*numbers.values()) % n == 0)
            raise InvalidSpec(where, f"must divide {name} of {preset}, {number}; got {ranks}; set {fitting}")
    if recipe.compile and config.attention_dropout:
        raise InvalidSpec(
            where,
            "not with compile and attention dropout: compiled, all ranks would drop the same of their heads; set "
            f"{path}model.overrides.attentionDropout: 0, or {path}compile: false",
        )


def parameters(config: ModelConfig) -> ParameterCount:
    return config.parameters()


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Causal-exact; see `ModelConfig.forward_flops_per_token`."""
    return config.forward_flops_per_token(sequence_length)


def palm_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """See `ModelConfig.palm_flops_per_token`."""
    return config.palm_flops_per_token(sequence_length)
