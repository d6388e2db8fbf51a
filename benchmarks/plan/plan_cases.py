"""What `trireme plan` is held against: families, shardings, precisions, with and without activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trireme_api.planning import Setting
from trireme_api.recipe import Recipe

LENGTH = 128
_PLAIN = {"dropout": 0.0, "attentionDropout": 0.0}


@dataclass(frozen=True)
class Case:
    name: str
    recipe: dict[str, Any]
    ranks: int = 4
    per_node: int = 4
    grown: int = 0

    @property
    def setting(self) -> Setting:
        """Of ranks on CPUs, as they are measured."""
        found = Setting.of(Recipe.model_validate(self.recipe), self.ranks, self.per_node, None)
        return replace(found, config=found.config.grown(self.grown))


def case(
    preset: str, *, ranks: int = 4, micro: int = 2, micro_batches: int = 1, precision: str = "bf16",
    checkpointing: bool = False, plain: bool = False, parallelism: dict[str, Any] | None = None,
    few: dict[str, Any] | None = None, grown: int = 0, **overrides: Any,
) -> Case:  # fmt: skip
    """`plain`: without dropout, which on a CPU keeps attention's scores. `few`: objective few-shot with these settings,
    on tasks with answers of half a row. `grown`: so many times."""
    shape = {"layers": 6, "width": 128, "heads": 4, **(_PLAIN if plain else {}), **overrides}
    masked = preset.startswith("xlmr") or "masked" in preset
    readers = ranks // (parallelism or {}).get("tensor", 1)
    recipe: dict[str, Any] = {
        "model": {"preset": preset, "overrides": shape},
        "objective": "masked-lm" if masked else "causal-lm",
        "data": {"sources": [{"path": "none"}], "sequenceLength": LENGTH},
        "batch": {"tokens": LENGTH * micro * micro_batches * readers, "micro": micro},
        "precision": precision,
        "activationCheckpointing": checkpointing,
        "parallelism": parallelism or {},
        "until": {"steps": 1},
    }
    if few is not None:
        recipe |= {"objective": "few-shot", "fewShot": few}
        recipe["data"]["sources"] = [{"path": "tasks://transduction"}]
    how = ", ".join(f"{name} {value}" for name, value in (parallelism or {"shard": "full"}).items())
    more = ", ".join(f"{name} {value}" for name, value in overrides.items())
    parts = [
        preset + (f" ({more})" if more else ""), f"{ranks} ranks", how, precision, f"{micro_batches} x {micro}",
        "checkpointing" if checkpointing else "", "no dropout" if plain else "", f"grown {grown}" if grown else "",
        "few-shot" + "".join(f" {value}" for value in few.values()) if few is not None else "",
    ]  # fmt: skip
    return Case(", ".join(part for part in parts if part), recipe, ranks, ranks, grown)


SHARDINGS: tuple[dict[str, Any], ...] = (
    {"shard": "full"}, {"shard": "grad-op"}, {"shard": "hybrid", "shardSize": 2}, {"shard": "hybrid", "shardSize": 1},
)  # fmt: skip
FAMILIES = ("opt-tiny", "gpt-tiny", "xglm-tiny", "moe-tiny", "xlmr-tiny", "normformer-tiny")


def cases() -> Iterator[Case]:
    for preset in FAMILIES:
        for checkpointing in (False, True):
            for sharding in SHARDINGS:
                yield case(preset, parallelism=sharding, checkpointing=checkpointing, plain=True)
        yield case(preset, micro_batches=2, plain=True)
        yield case(preset, precision="fp32", plain=True)
        yield case(preset)
    yield case("gpt-tiny", ranks=1, plain=True)
    yield case("gpt-tiny", ranks=1, precision="fp32", checkpointing=True, plain=True)
    yield case("gpt-tiny", parallelism={"shard": "grad-op"}, micro_batches=2, plain=True)
    yield case("gpt-tiny", parallelism={"shard": "hybrid", "shardSize": 2}, micro_batches=2, plain=True)
    yield case("gpt-tiny", parallelism={"prefetch": {"backward": 2}}, plain=True)
    yield case("gpt-tiny", parallelism={"prefetch": {"backward": 0}}, plain=True)
    yield case("gpt-tiny", parallelism={"reshardAfterForward": False}, plain=True)
    for experts in (2, 4):
        for checkpointing in (False, True):
            yield case("moe-tiny", parallelism={"expert": experts}, checkpointing=checkpointing, plain=True, experts=8)
    yield case("moe-tiny", parallelism={"shard": "hybrid", "shardSize": 2, "expert": 2}, plain=True, experts=8)
    for preset in FAMILIES:
        yield case(preset, parallelism={"tensor": 2}, plain=True)
        yield case(preset, parallelism={"tensor": 4}, checkpointing=True, plain=True)
    yield case("gpt-tiny", parallelism={"shard": "hybrid", "shardSize": 2, "tensor": 2}, micro_batches=2, plain=True)
    yield case("gpt-tiny", parallelism={"tensor": 2}, precision="fp32")
    yield case("moe-tiny", plain=True, capacity="dropless")
    yield case("moe-tiny", parallelism={"expert": 2}, plain=True, capacity="dropless")
    yield case("growing-tiny", plain=True, splits=";".join(["0,0"] * 6))
    for sharding in SHARDINGS:
        yield case("ensemble-tiny", parallelism=sharding, plain=True, members=3)
        yield case("ensemble-tiny", parallelism=sharding, micro_batches=2, plain=True, members=3)
    yield case("growing-ensemble-tiny", plain=True, grown=2)
    yield case("growing-ensemble-tiny", micro_batches=2, plain=True, grown=2)
    yield case("opt-tiny", plain=True, preNorm=False, embeddingWidth=64)
    yield case("normformer-tiny", plain=True, headScale="code", activation="relu2")
    yield case("normformer-masked-tiny", plain=True)
    for outer in ("accumulate", "final"):
        few = {"outerGrad": outer, "examples": 2}
        for sharding in SHARDINGS:
            yield case("opt-tiny", micro=4, parallelism=sharding, plain=True, few=few)
        yield case("opt-tiny", micro=4, checkpointing=True, plain=True, few=few)
        yield case("gpt-tiny", micro=2, micro_batches=2, plain=True, few=few)
        yield case("gpt-tiny", micro=4, precision="fp32", few={**few, "embedding": "compositional"})
    yield case("gpt-tiny", plain=True, layers=12, width=256, vocabularySize=8192)
    yield case("opt-tiny", plain=True, layers=12, width=256, checkpointing=True)
