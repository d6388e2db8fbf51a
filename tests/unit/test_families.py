"""Presets and their arithmetic, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from trireme_api import families
from trireme_api.families import PRESETS, check_recipe, resolve
from trireme_api.families.gpt import GptConfig
from trireme_api.families.memory import state_memory
from trireme_api.families.mixture import MixtureConfig
from trireme_api.families.moe import MoeConfig
from trireme_api.families.normformer import NormFormerBlocks
from trireme_api.families.opt import OptConfig
from trireme_api.recipe import ModelSpec, Recipe
from trireme_api.schema import InvalidSpec

# Of the released checkpoints (vocabulary 50,272, tied), counted on the real models.
RELEASED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    # Tied, positions computed: counted on Transformers' models.
    "xglm-564m": 564_463_616,
    "xglm-1.7b": 1_732_907_008,
    "xglm-2.9b": 2_941_505_536,
    "xglm-4.5b": 4_552_511_488,
    "xglm-7.5b": 7_492_771_840,
    "xlmr-xl": 3_482_741_760,
    "xlmr-xxl": 10_712_994_816,
}

# Table 1: layers, heads, width, peak learning rate, batch in tokens.
TABLE_1 = {
    "opt-125m": (12, 12, 768, 6.0e-4, 0.5),
    "opt-350m": (24, 16, 1024, 3.0e-4, 0.5),
    "opt-1.3b": (24, 32, 2048, 2.0e-4, 1),
    "opt-2.7b": (32, 32, 2560, 1.6e-4, 1),
    "opt-6.7b": (32, 32, 4096, 1.2e-4, 2),
    "opt-13b": (40, 40, 5120, 1.0e-4, 4),
    "opt-30b": (48, 56, 7168, 1.0e-4, 4),
    "opt-66b": (64, 72, 9216, 0.8e-4, 2),
    "opt-175b": (96, 96, 12288, 1.2e-4, 2),
}


def _opt(name: str) -> OptConfig:
    config = PRESETS[name].config
    assert isinstance(config, OptConfig)
    return config


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_model(name: str) -> None:
    count = families.parameters(PRESETS[name].config)
    assert count.total == RELEASED[name]
    assert count.activated == count.total


@pytest.mark.parametrize("name", TABLE_1)
def test_preset_is_the_papers_table(name: str) -> None:
    layers, heads, width, learning_rate, mega_tokens = TABLE_1[name]
    config, recipe = _opt(name), PRESETS[name].recipe
    assert (config.layers, config.heads, config.width) == (layers, heads, width)
    assert config.feed_forward_width == 4 * width
    assert recipe.peak_learning_rate == learning_rate
    assert recipe.batch_tokens == mega_tokens * 1024 * 1024
    assert config.dropout == config.attention_dropout == 0.1


# fairseq examples/moe_lm: layers, heads, width, peak learning rate, batch in Mi tokens, warm-up updates, all updates.
MOE_LM_DENSE = {
    "gpt-125m": (12, 12, 768, 6.0e-4, 0.5, 715, 572204),
    "gpt-355m": (24, 16, 1024, 3.0e-4, 0.5, 715, 572204),
    "gpt-1.3b": (24, 32, 2048, 2.0e-4, 1, 357, 286102),
    "gpt-2.7b": (32, 32, 2560, 1.6e-4, 1, 357, 286102),
    "gpt-6.7b": (32, 32, 4096, 1.2e-4, 2, 187, 143051),
    "gpt-13b": (40, 40, 5120, 1.0e-4, 2, 187, 143051),
}


@pytest.mark.parametrize("name", MOE_LM_DENSE)
def test_dense_baselines_are_those_of_the_runs(name: str) -> None:
    layers, heads, width, learning_rate, mega_tokens, warmup, updates = MOE_LM_DENSE[name]
    config, recipe = PRESETS[name].config, PRESETS[name].recipe
    assert isinstance(config, GptConfig)
    assert (config.layers, config.heads, config.width, config.feed_forward_width) == (layers, heads, width, 4 * width)
    assert config.dropout == (0.0 if name == "gpt-355m" else 0.1)
    assert recipe.peak_learning_rate == learning_rate
    assert recipe.warmup_tokens == warmup * recipe.batch_tokens
    assert recipe.decay_tokens / recipe.batch_tokens == pytest.approx(updates, abs=1)
    assert (recipe.clip, recipe.final_fraction, recipe.weight_decay, recipe.betas) == (0.0, 0.0, 0.01, (0.9, 0.98))
    assert recipe.batch_tokens == mega_tokens * 1024 * 1024


# model card of fairseq examples/moe_lm: ZFLOPs of 300B tokens.
ZETTA = {
    "gpt-125m": 0.364, "gpt-355m": 1.059, "gpt-1.3b": 3.567, "gpt-2.7b": 7.076, "gpt-6.7b": 17.119, "gpt-13b": 32.673,
}  # fmt: skip


@pytest.mark.parametrize("name", ZETTA)
def test_training_flops_are_the_published_ones(name: str) -> None:
    """Their formula: blocks four times (recomputed), output layer three, full square; vocabulary 50,000."""
    config = PRESETS[name].config.model_copy(update={"vocabulary_size": 50000})
    whole, blocks = (f(2048, causal=False) for f in (config.forward_flops_per_token, config.block_flops_per_token))
    per_token = 3 * whole + blocks
    assert 300e9 * per_token / 1e21 == pytest.approx(ZETTA[name], abs=0.0006)


# fairseq examples/moe_lm and its model card: (total of experts and the rest in billions at vocabulary 51,200, ZFLOPs).
MIXTURES = {
    "moe-15b": (14.61, 0.432), "moe-52b": (51.83, 1.300), "moe-207b": (207.14, 4.533), "moe-1.1t": (1104.2, 22.273),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_have_the_published_size_and_cost(name: str) -> None:
    """Their FLOPs leave the gates out and count the second expert of every second block four times."""
    config, (billions, zetta) = PRESETS[name].config, MIXTURES[name]
    assert isinstance(config, MoeConfig)
    assert config.parameters().total / 1e9 == pytest.approx(billions, rel=4e-4)
    same = config.model_copy(update={"vocabulary_size": 50000})
    whole, blocks = (f(2048, causal=False) for f in (same.forward_flops_per_token, same.block_flops_per_token))
    gates = 4 * config.mixtures * 2 * config.width * config.experts
    assert 300e9 * (3 * whole + blocks - gates) / 1e21 == pytest.approx(zetta, rel=1.5e-3)


def test_the_example_of_the_authors_is_matched_exactly() -> None:
    """README.moe.md of fairseq's moe branch: 24 layers of width 2048, 8 experts, vocabulary 50,000."""
    config = MoeConfig(layers=24, width=2048, heads=32, experts=8, vocabulary_size=50000)
    one = config.mixtures * config.expert_parameters()
    assert one == 402_776_064
    assert config.parameters().total - 8 * one == 908_423_168
    assert config.parameters().activated == 908_423_168 + 2 * one


def test_a_mixture_without_enough_experts_or_blocks_is_refused() -> None:
    for change, words in (({"experts": 1}, "experts must be at least 2"), ({"moeEvery": 3}, "no block has experts")):
        with pytest.raises(InvalidSpec, match=words):
            resolve(ModelSpec(preset="moe-tiny", overrides=change))


def test_warm_up_of_the_largest_is_in_steps_and_of_the_others_in_tokens() -> None:
    largest = PRESETS["opt-175b"].recipe
    assert largest.warmup_tokens == 2000 * largest.batch_tokens
    others = {p.recipe.warmup_tokens for p in PRESETS.values() if p.config.family == "opt" and p.name != "opt-175b"}
    assert others == {375e6}


def test_released_350m_differs_from_what_the_table_prescribes() -> None:
    released, prescribed = _opt("opt-350m"), _opt("opt-350m-preln")
    assert (released.pre_norm, released.embedding_width) == (False, 512)
    assert (prescribed.pre_norm, prescribed.embedding_width) == (True, 1024)
    # Full-width table, no projections, a final LayerNorm.
    assert prescribed.parameters().total - released.parameters().total == 50272 * 512 - 2 * 512 * 1024 + 2 * 1024


def _attended_pairs(length: int) -> int:
    return sum(1 for query in range(length) for key in range(length) if key <= query)


@pytest.mark.parametrize("name", ["opt-tiny", "opt-350m", "opt-1.3b"])
@pytest.mark.parametrize("length", [1, 2, 77, 256])
def test_forward_flops_count_every_attended_pair_once(name: str, length: int) -> None:
    c = _opt(name)
    d, w, f = c.width, c.embedding_width, c.feed_forward_width
    matrices = [(d, d)] * 4 + [(d, f), (f, d)]
    per_layer = 2 * length * sum(a * b for a, b in matrices) + 2 * 2 * d * _attended_pairs(length)
    outside = 2 * length * (c.vocabulary_size * w + (2 * w * d if w != d else 0))
    counted = c.layers * per_layer + outside
    assert families.forward_flops_per_token(c, length) * length == pytest.approx(counted, rel=1e-12)


def test_recomputation_runs_the_blocks_a_second_time_and_not_the_head() -> None:
    c = _opt("opt-125m")
    plain = c.hardware_flops_per_token(2048, activation_checkpointing=False)
    again = c.hardware_flops_per_token(2048, activation_checkpointing=True)
    assert plain == c.train_flops_per_token(2048) == 3 * c.forward_flops_per_token(2048)
    head, last_products = 2 * 50272 * 768, 12 * 2 * 768 * 3072
    assert again - plain == c.forward_flops_per_token(2048) - head - last_products
    post = _opt("opt-350m")
    assert post.recomputed_flops_per_token(2048) == post.block_flops_per_token(2048)


@pytest.mark.parametrize(
    ("name", "ratio"), [("opt-125m", 1.13), ("opt-1.3b", 1.07), ("opt-13b", 1.03), ("opt-175b", 1.014)]
)
def test_palm_formula_overstates_small_models_as_published(name: str, ratio: float) -> None:
    c = _opt(name)
    assert families.palm_flops_per_token(c, 2048) / c.train_flops_per_token(2048) == pytest.approx(ratio, abs=0.006)


def test_opt_175b_run_cost_what_its_authors_logged() -> None:
    """4.30e23 FLOPs for 300B tokens, with recomputation counted (their formula: full square, four passes)."""
    c = _opt("opt-175b")
    full_square = 3 * c.forward_flops_per_token(2048, causal=False) + c.block_flops_per_token(2048, causal=False)
    assert full_square * 300e9 == pytest.approx(4.30e23, rel=0.01)


class TestResolve:
    def test_overrides_replace_single_numbers(self) -> None:
        config = resolve(ModelSpec(preset="opt-125m", overrides={"layers": 2, "dropout": 0, "vocabularySize": 8192}))
        assert isinstance(config, OptConfig)
        assert (config.layers, config.dropout, config.vocabulary_size, config.width) == (2, 0.0, 8192, 768)

    def test_derived_widths_follow_an_overridden_width(self) -> None:
        config = resolve(ModelSpec(preset="opt-125m", overrides={"width": 48}))
        assert isinstance(config, OptConfig)
        assert (config.embedding_width, config.feed_forward_width) == (48, 192)

    def test_a_width_the_preset_states_stays(self) -> None:
        config = resolve(ModelSpec(preset="opt-350m", overrides={"width": 64}))
        assert isinstance(config, OptConfig)
        assert (config.embedding_width, config.feed_forward_width) == (512, 256)

    @pytest.mark.parametrize(
        ("spec", "field", "words"),
        [
            ({"preset": "opt-125"}, "model.preset", "opt-125m"),
            ({"preset": "zzz"}, "model.preset", "trireme models"),
            ({"preset": "opt-8m", "overrides": {"layer": 2}}, "model.overrides.layer", "'layers'"),
            ({"preset": "opt-8m", "overrides": {"qqqq": 2}}, "model.overrides.qqqq", "known: "),
            ({"preset": "opt-8m", "overrides": {"heads": 3}}, "model.overrides", "not a multiple of 3"),
            ({"preset": "opt-8m", "overrides": {"width": -8}}, "model.overrides.width", "-8"),
            ({"preset": "opt-8m", "overrides": {"width": "wide"}}, "model.overrides.width", "'wide'"),
            ({"preset": "opt-8m", "overrides": {"layers": 1.5}}, "model.overrides.layers", "1.5"),
            ({"preset": "opt-8m", "overrides": {"heads": True}}, "model.overrides.heads", "True"),
            ({"preset": "opt-8m", "overrides": {"dropout": 1.0}}, "model.overrides.dropout", "less than 1"),
            ({"preset": "opt-8m", "overrides": {"vocabularySize": 3}}, "model.overrides.vocabularySize", "4"),
        ],
    )
    def test_bad_input_names_the_field_in_one_line(self, spec: dict[str, object], field: str, words: str) -> None:
        with pytest.raises(InvalidSpec) as caught:
            resolve(ModelSpec.model_validate(spec))
        assert caught.value.field == field
        assert words in caught.value.message
        assert "\n" not in str(caught.value)

    def test_path_prefix_is_the_callers(self) -> None:
        with pytest.raises(InvalidSpec, match=r"^spec\.recipe\.model\.preset: "):
            resolve(ModelSpec(preset="nope"), path="spec.recipe.model")


def _recipe(preset: str, length: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"preset": preset},
            "data": {"sources": [{"path": "x"}], "sequenceLength": length},
            "batch": {"tokens": length},
            "until": {"steps": 1},
        }
    )


def test_a_sequence_longer_than_the_position_table_is_refused() -> None:
    assert check_recipe(_recipe("opt-tiny", 256)).maximum_positions == 256
    with pytest.raises(InvalidSpec, match=r"^data\.sequenceLength: must be at most 256"):
        check_recipe(_recipe("opt-tiny", 257))


def test_what_a_token_sees_decides_the_objective() -> None:
    both = _recipe("xlmr-tiny", 64)
    with pytest.raises(InvalidSpec, match=r"^objective: must be masked-lm for xlmr-tiny, .*; got causal-lm"):
        check_recipe(both)
    assert not check_recipe(both.model_copy(update={"objective": "masked-lm"})).causal
    masked = _recipe("opt-tiny", 64).model_copy(update={"objective": "masked-lm"})
    with pytest.raises(InvalidSpec, match=r"^spec\.objective: masked-lm needs .* opt-tiny does not; .*xlmr-xl"):
        check_recipe(masked, "spec.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"masking": {}}, "masking goes with objective: masked-lm"),
        ({"objective": "masked-lm", "masking": {"random": 0.6, "keep": 0.5}}, "at most 1 together; got 0.6 and 0.5"),
        ({"objective": "masked-lm", "masking": {"share": 0}}, "greater than 0"),
        ({"objective": "masked-lm", "data": {"sources": [{"path": "x"}], "sequenceLength": 2}}, "at least 3"),
        ({"objective": "masked-lm", "data": {"sources": [{"path": "tasks://transduction"}]}}, "shards, not tasks://"),
    ],
)
def test_masking_that_cannot_be(change: dict[str, object], words: str) -> None:
    recipe = {**_recipe("xlmr-tiny", 2).model_dump(by_alias=True, exclude_unset=True), **change}
    recipe["batch"] = {"tokens": 2048}
    with pytest.raises(ValidationError, match=re.escape(words)):
        Recipe.model_validate(recipe)


def test_a_masked_normformer_adds_what_the_causal_one_does() -> None:
    """And without additions it is XLM-R's network."""
    off = {"postAttentionNorm": False, "headScale": "none", "innerNorm": False, "residualScale": False}
    bare = resolve(ModelSpec(preset="normformer-masked-tiny", overrides=off))
    assert bare.parameters() == PRESETS["xlmr-tiny"].config.parameters()
    causal, masked = PRESETS["normformer-125m"].config, PRESETS["normformer-masked-125m"].config
    assert isinstance(masked, NormFormerBlocks)
    assert isinstance(causal, NormFormerBlocks)
    assert masked.extra_parameters() == causal.extra_parameters() == (92_304 + 9_216) // 12


class TestMemory:
    def test_sixteen_bytes_a_parameter_unsharded(self) -> None:
        config = _opt("opt-1.3b")
        memory = state_memory(config)
        assert memory.total == 16 * config.parameters().total
        assert (memory.weights, memory.gradients, memory.optimizer) == tuple(
            k * config.parameters().total for k in (4, 4, 8)
        )

    def test_uneven_shards_count_the_largest(self) -> None:
        config = _opt("opt-tiny")
        assert state_memory(config, shards=7).weights == 4 * -(-config.parameters().total // 7)

    def test_units_and_what_lies_outside_are_the_model(self) -> None:
        for name in ("opt-1.3b", "moe-15b", "normformer-1.3b", "xlmr-xl"):
            config = PRESETS[name].config
            units = [config.unit(index) for index in range(config.layers)]
            inside = sum(unit.shared + unit.routed for unit in units)
            outside = config.vocabulary_size * config.width
            assert outside <= config.parameters().total - inside < 1.2 * outside, name
            assert max(unit.shared + unit.routed for unit in units) == config.block_parameters()

    def test_no_shards_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="shards"):
            state_memory(_opt("opt-tiny"), shards=0)


def test_families_need_no_torch() -> None:
    code = "import sys, trireme_api.families, trireme_api.families.memory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Parameters of the pre-LN baseline, what NormFormer adds to it (2d + 8d + heads a layer), and what its residual scale
# does (d a layer): the paper prints 124.5M and 2649.5M.
NORMFORMER = {
    "normformer-125m": ("gpt-125m", 124_377_600, 92_304, 9_216),
    "normformer-355m": ("gpt-355m", 354_740_224, 246_144, 24_576),
    "normformer-1.3b": ("gpt-1.3b", 1_313_460_224, 492_288, 49_152),
    "normformer-2.7b": ("gpt-2.7b", 2_648_724_480, 820_224, 81_920),
}


@pytest.mark.parametrize("name", NORMFORMER)
def test_normformer_adds_exactly_its_norms_and_factors(name: str) -> None:
    baseline, parameters, added, scaled = NORMFORMER[name]
    assert PRESETS[baseline].config.parameters().total == parameters
    totals = {
        scale: resolve(ModelSpec(preset=name, overrides={"residualScale": scale})).parameters().total
        for scale in (False, True)
    }
    assert totals == {False: parameters + added, True: parameters + added + scaled}
    code = resolve(ModelSpec(preset=name, overrides={"residualScale": False, "headScale": "code"}))
    assert code.parameters().total == parameters + added
    assert added / parameters < 0.001, "not the 0.4 % of the abstract"


def test_normformer_scales_its_residual_where_the_paper_does() -> None:
    scaled = {name: PRESETS[name].config.model_dump()["residual_scale"] for name in NORMFORMER}
    assert scaled == {
        "normformer-125m": True, "normformer-355m": True, "normformer-1.3b": False, "normformer-2.7b": False,
    }
    rates = {name: PRESETS[name].recipe.peak_learning_rate for name in NORMFORMER}
    assert list(rates.values()) == [3e-3, 1e-3, 6e-4, 6e-4]


# Routers of the Transformer mixtures that sparse all-MLP is compared with: (experts of a token, gate or not).
ROUTERS = {"top-2": (2, True), "top-1": (1, True), "hash": (1, False), "base": (1, True)}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("preset", ["moe-15b", "smlp-1.7b"])
def test_a_router_decides_what_a_token_goes_through_and_costs(preset: str, router: str) -> None:
    choices, gated = ROUTERS[router]
    config = resolve(ModelSpec(preset=preset, overrides={"router": router}))
    other = resolve(ModelSpec(preset=preset, overrides={"router": "hash"}))
    assert isinstance(config, MixtureConfig)
    mixtures = 6 if preset == "moe-15b" else 5
    gates = mixtures * 768 * config.experts * gated
    assert config.parameters().total - other.parameters().total == gates
    more = mixtures * (choices - 1) * config.expert_parameters()
    assert config.parameters().activated - other.parameters().activated == gates + more
    flops = config.forward_flops_per_token(1024) - other.forward_flops_per_token(1024)
    assert flops == 2 * gates + (choices - 1) * mixtures * 4 * 768 * 3072


def test_places_of_an_expert_follow_the_router_unless_stated() -> None:
    def factor(**overrides: Any) -> float:
        config = resolve(ModelSpec(preset="moe-tiny", overrides=overrides))
        assert isinstance(config, MixtureConfig)
        return config.capacity_factor

    assert {router: factor(router=router) for router in ROUTERS} == {
        "top-2": 2.0, "top-1": 1.25, "hash": 1.25, "base": 1.0,
    }  # fmt: skip
    assert factor(router="top-1", capacityFactor=3.0) == 3.0


# Counted on the modules (tests/trainer/test_family_models.py); 9.4 billion is the size reported of 2203.06850.
def test_sparse_all_mlp_is_of_the_size_and_cost_it_is_named_after() -> None:
    small, large = PRESETS["smlp-1.7b"].config, PRESETS["smlp-9.4b"].config
    assert (small.parameters().total, small.parameters().activated) == (1_699_539_712, 211_973_632)
    assert (large.parameters().total, large.parameters().activated) == (9_429_723_136, 901_695_488)
    for ours, theirs in ((small, "gpt-125m"), (large, "gpt-355m"), (PRESETS["gmlp-125m"].config, "gpt-125m")):
        flops = PRESETS[theirs].config.forward_flops_per_token(1024)
        assert ours.forward_flops_per_token(1024) == pytest.approx(flops, rel=0.03)


def test_causal_flops_of_a_spatial_matrix_are_its_lower_triangle() -> None:
    config = PRESETS["gmlp-tiny"].config
    square, exact = (config.forward_flops_per_token(96, causal=causal) * 96 for causal in (False, True))
    assert square - exact == 2 * config.layers * 192 * (96 * 96 - _attended_pairs(96))
