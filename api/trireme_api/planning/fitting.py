"""Other ways to spread the same recipe, and, where it does not fit, what would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trireme_api.families import check_recipe
from trireme_api.planning.setting import Setting
from trireme_api.schema import InvalidSpec

MOST_RANKS = 65_536


@dataclass(frozen=True)
class Way:
    """One way to run the recipe."""

    name: str
    setting: Setting
    own: bool = False
    """What the recipe says."""


def ways(setting: Setting) -> list[Way]:
    """The recipe's own, then each other sharding, with and without activation checkpointing."""
    own = Way(_name(setting), setting, own=True)
    found = [own]
    for checkpointing in (setting.recipe.activation_checkpointing, not setting.recipe.activation_checkpointing):
        for shard in ("full", "hybrid", "grad-op"):
            if shard == "hybrid" and setting.ranks <= setting.per_node:
                continue
            plan = setting.recipe.parallelism.model_copy(
                update={"shard": shard, "shard_size": None, "reshard_after_forward": None, "accumulation": "auto"}
            )
            other = setting.changed(parallelism=plan, activation_checkpointing=checkpointing)
            name = _name(other)
            if shard == "hybrid" and other.shards == other.ranks:
                continue
            if name not in [way.name for way in found]:
                found.append(Way(name, other))
    return found


def _name(setting: Setting) -> str:
    plan = setting.recipe.parallelism
    size = f" {setting.shards}" if plan.shard == "hybrid" else ""
    usual = plan.model_copy(update={"reshard_after_forward": None}).reshards_after_forward
    kept = "" if plan.reshards_after_forward == usual else (", resharded" if not usual else ", not resharded")
    local = f", {plan.accumulation}" if plan.accumulation != "auto" else ""
    return f"{plan.shard}{size}{kept}{local}" + (" + checkpointing" if setting.recipe.activation_checkpointing else "")


def remedies(setting: Setting) -> list[str]:
    """Changes that make a recipe fit which does not: single ones, else all that keep the ranks, else more ranks."""
    found = [name for name, other in _single(setting) if other.fits()]
    if found:
        return found
    batch = setting.recipe.batch.model_copy(update={"micro": 1})
    plan = setting.recipe.parallelism.model_copy(
        update={"shard": "full", "shard_size": None, "reshard_after_forward": None, "accumulation": "auto"}
    )
    leanest = setting.changed(batch=batch, parallelism=plan, activation_checkpointing=True)
    together = "parallelism.shard: full, activationCheckpointing: true, batch.micro: 1"
    if leanest.fits():
        return [f"all of {together}"]
    ranks = setting.ranks
    while (ranks := 2 * ranks) <= MOST_RANKS:
        if leanest.changed(ranks=ranks).fits():
            return [f"{ranks} devices, with {together}"]
    return [
        f"nothing here: with {together}, on {ranks // 2} devices, one still needs "
        f"{leanest.changed(ranks=ranks // 2).memory().total / 2**30:,.1f} GiB; take a device with more memory, or a "
        "shorter data.sequenceLength"
    ]


def _single(setting: Setting) -> Iterator[tuple[str, Setting]]:
    recipe = setting.recipe
    if not recipe.activation_checkpointing:
        yield "activationCheckpointing: true", setting.changed(activation_checkpointing=True)
    micro = setting.micro_sequences
    while (micro := micro // 2) >= recipe.together:
        smaller = setting.changed(batch=recipe.batch.model_copy(update={"micro": micro}))
        if smaller.fits():
            yield f"batch.micro: {micro}", smaller
            break
    if recipe.parallelism.shard != "full":
        plan = recipe.parallelism.model_copy(update={"shard": "full", "reshard_after_forward": None})
        yield "parallelism.shard: full", setting.changed(parallelism=plan)
    experts = getattr(setting.config, "experts", 1)
    for share in range(2 * recipe.parallelism.expert, experts + 1) if recipe.parallelism.tensor == 1 else ():
        if experts % share == 0 and setting.shards % share == 0:
            plan = recipe.parallelism.model_copy(update={"expert": share})
            if (other := setting.changed(parallelism=plan)).fits():
                yield f"parallelism.expert: {share}", other
                break
    if recipe.parallelism.expert == 1:
        for ranks in range(2 * recipe.parallelism.tensor, setting.per_node + 1):
            plan = recipe.parallelism.model_copy(update={"tensor": ranks})
            if _divides(other := setting.changed(parallelism=plan)) and other.fits():
                yield f"parallelism.tensor: {ranks}", other
                break
    for times in (2, 4, 8):
        more = setting.changed(ranks=times * setting.ranks)
        if more.share.world <= more.share.sequences and more.fits():
            yield f"{more.ranks} devices in place of {setting.ranks}", more
            break


def _divides(setting: Setting) -> bool:
    """Whether the model and the ranks can be divided so."""
    try:
        check_recipe(setting.recipe)
        setting.recipe.parallelism.check_ranks(setting.ranks)
    except InvalidSpec:
        return False
    return True
