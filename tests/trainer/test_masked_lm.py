"""The masked language model's objective: what is hidden, that nothing but it counts, and that it trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gang import SEQUENCE, SEQUENCES, Gang, make_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import fresh_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trireme_api.families import check_recipe
from trireme_api.masking import MaskingSpec
from trireme_api.recipe import Recipe
from trireme_trainer.checkpoint.same_run import check_same_run
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.masking import MaskedBatch, MaskingRule
from trireme_trainer.data.tokenizer import SpecialTokens, special_tokens
from trireme_trainer.lifecycle.outcome import BadData
from trireme_trainer.objectives.cross_entropy import IGNORED
from trireme_trainer.objectives.masked_lm import MaskedBatches, MaskedLM, MaskedText, MaskedTokens
from trireme_trainer.parallel.world import World
from trireme_trainer.telemetry.metering import Arithmetic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
from data_corpus import numbered, write_corpus

VOCABULARY = 1000
SPECIAL = SpecialTokens(frozenset({0, 1, 2, 3, 999}), mask=999, begin=0)
SMALL = {
    "dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": SEQUENCE, "width": 32, "vocabularySize": 384,
}  # fmt: skip


def masked(corpus: Path, *, steps: int = 6, preset: str = "xlmr-tiny", **changes: Any) -> dict[str, Any]:
    model = {"preset": preset, "overrides": SMALL}
    return make_recipe(corpus, steps=steps, model=model, objective="masked-lm", **changes)


def batches_of(recipe: dict[str, Any], step: int, world: int = 1, rank: int = 0) -> list[MaskedBatch]:
    spec = Recipe.model_validate(recipe)
    with MaskedBatches(MaskedText(spec), spec, rank, world) as batches:
        made = batches.micro_batches(step)
    return [batch for batch in made if isinstance(batch, MaskedBatch)]


class TestRule:
    def test_of_a_million_tokens_15_percent_in_shares_of_80_10_10(self) -> None:
        """±0.2 points; and the random ones are drawn evenly from what is not special."""
        rule = MaskingRule(MaskingSpec(), SPECIAL, VOCABULARY)
        tokens = 4 + np.arange(2000) % 995
        chosen = hidden = kept = 0
        drawn = np.zeros(VOCABULARY)
        for key in range(500):
            seen, places = rule.apply(tokens, key)
            chosen += len(places)
            now, was = seen[places], tokens[places]
            hidden += int((now == SPECIAL.mask).sum())
            kept += int((now == was).sum())
            other = now[(now != SPECIAL.mask) & (now != was)]
            drawn += np.bincount(other, minlength=VOCABULARY)
        assert chosen / 1e6 == pytest.approx(0.15, abs=0.002)
        assert hidden / chosen == pytest.approx(0.8, abs=0.002)
        # One in 995 of the random ones is the token that was there.
        assert kept / chosen == pytest.approx(0.1 + 0.1 / 995, abs=0.002)
        assert drawn.sum() / chosen == pytest.approx(0.1 - 0.1 / 995, abs=0.002)
        assert not drawn[list(SPECIAL.ids)].any()
        expected = drawn.sum() / 995
        assert ((drawn[4:999] - expected) ** 2 / expected).sum() < 995 + 5 * (2 * 995) ** 0.5, "χ², five deviations"

    @settings(max_examples=100)
    @given(
        st.lists(st.sampled_from([0, 1, 2, 3, 999, 4, 5, 77, 998]), min_size=2, max_size=80),
        st.floats(0.01, 0.99), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 2**64 - 1),
    )  # fmt: skip
    def test_special_tokens_stay_and_nothing_else_moves(
        self, ids: list[int], share: float, random: float, keep: float, key: int
    ) -> None:
        tokens = np.array([0, *ids])
        spec = MaskingSpec(share=share, random=random, keep=keep)
        seen, places = MaskingRule(spec, SPECIAL, VOCABULARY).apply(tokens, key)
        assert list(places) == sorted(set(places))
        assert not set(tokens[places].tolist()) & SPECIAL.ids
        rest = np.delete(np.arange(len(tokens)), places)
        assert np.array_equal(seen[rest], tokens[rest])
        candidates = sum(token not in SPECIAL.ids for token in tokens.tolist())
        assert len(places) - share * candidates < 1
        assert share * candidates - len(places) < 1
        assert len(places) <= spec.places(len(tokens))

    def test_the_same_key_hides_the_same_and_another_something_else(self) -> None:
        rule = MaskingRule(MaskingSpec(), SPECIAL, VOCABULARY)
        tokens = 4 + np.arange(200)
        (seen, places), (again, same), (other, elsewhere) = (rule.apply(tokens, key) for key in (5, 5, 6))
        assert np.array_equal(seen, again)
        assert np.array_equal(places, same)
        assert not np.array_equal(places, elsewhere)
        assert not np.array_equal(seen, other)

    def test_golden(self) -> None:
        """A job resumed under a newer trireme must have the same tokens hidden."""
        seen, places = MaskingRule(MaskingSpec(), SPECIAL, VOCABULARY).apply(4 + np.arange(60), 2026)
        assert places.tolist() == [8, 9, 17, 25, 34, 35, 40, 55, 56]
        assert seen[places].tolist() == [999, 999, 999, 999, 999, 430, 999, 999, 60]


class TestText:
    def test_blocks_begin_with_s_and_the_text_is_all_there(self, corpus: Path) -> None:
        recipe = Recipe.model_validate(masked(corpus))
        text = MaskedText(recipe)
        blocks = text.mixture.blocks_per_epoch[0]
        tokens = [text.sample(index)[0] for index in range(blocks)]
        assert {len(block) for block in tokens} == {SEQUENCE}
        assert {int(block[0]) for block in tokens} == {0}
        manifest = json.loads((corpus / "manifest.json").read_text())
        assert blocks == manifest["train"]["tokens"] // (SEQUENCE - 1)
        words = np.concatenate([block[1:] for block in tokens])
        assert np.array_equal(np.sort(words), np.sort(np.concatenate([text.mixture.sample(i) for i in range(blocks)])))

    def test_another_epoch_and_another_seed_hide_something_else(self, corpus: Path) -> None:
        text = MaskedText(Recipe.model_validate(masked(corpus)))
        other = MaskedText(Recipe.model_validate(masked(corpus, seed=8)))
        blocks = text.mixture.blocks_per_epoch[0]
        first = [text.sample(i)[2].tolist() for i in range(blocks)]
        assert [text.sample(i)[2].tolist() for i in range(blocks)] == first
        for changed in (
            [text.sample(blocks + i)[2].tolist() for i in range(blocks)],
            [other.sample(i)[2].tolist() for i in range(blocks)],
        ):
            same = sum(a == b for a, b in zip(first, changed, strict=True))
            assert same < blocks / 20

    def test_any_world_has_the_same_global_batch(self, corpus: Path) -> None:
        def union(world: int) -> list[tuple[Any, ...]]:
            found = []
            for rank in range(world):
                for batch in batches_of(masked(corpus), 3, world, rank):
                    rows = len(batch.tokens)
                    places = batch.places.view(rows, MaskingSpec().places(SEQUENCE))
                    places = places - torch.arange(rows)[:, None] * SEQUENCE
                    for tokens, targets, row in zip(batch.tokens, batch.targets, places, strict=True):
                        counted = (targets != IGNORED).nonzero().flatten().tolist()
                        assert sorted(set(row.tolist()) - {0}) == counted
                        if counted:
                            found.append((tuple(tokens.tolist()), tuple(targets.tolist())))
            return sorted(found)

        assert len(union(1)) == SEQUENCES
        assert union(1) == union(2) == union(3) == union(5)

    def test_a_checkpoint_of_another_rule_or_objective_is_refused(self, corpus: Path) -> None:
        recipe = Recipe.model_validate(masked(corpus))
        text = MaskedText(recipe)
        other = MaskedText(Recipe.model_validate(masked(corpus, masking={"share": 0.4})))
        assert text.changes_since(text.identity) == []
        (line,) = other.changes_since(text.identity)
        assert line.startswith("masking was {'share': 0.15")
        meta = {"batchTokens": recipe.batch.tokens, "data": text.mixture.identity}
        with pytest.raises(BadData, match="objective was None, is masked-lm"):
            check_same_run(meta, recipe, check_recipe(recipe), text, "here")


class TestSpecialTokens:
    def test_a_prepared_tokenizer_has_a_mask_token_at_its_end(self, corpus: Path) -> None:
        found = special_tokens((corpus / "tokenizer.json").read_bytes(), "here", 2)
        assert found == SpecialTokens(frozenset({0, 1, 2, 3, found.mask}), mask=found.mask, begin=0)
        assert found.mask == json.loads((corpus / "manifest.json").read_text())["vocabulary"] - 1

    def test_a_tokenizer_without_one_is_refused_with_the_remedy(self) -> None:
        content = {"added_tokens": [{"id": 7, "content": "<|endoftext|>", "special": True}]}
        with pytest.raises(DataError, match=r"^here: its tokenizer has no mask token .*; prepare the text again"):
            special_tokens(json.dumps(content).encode(), "here", 7)
        content["added_tokens"].append({"id": 9, "content": "[MASK]", "special": True})
        found = special_tokens(json.dumps(content).encode(), "here", 7)
        assert found == SpecialTokens(frozenset({7, 9}), mask=9, begin=7)

    def test_text_prepared_without_one_is_named(self, tmp_path: Path) -> None:
        old = Path(write_corpus(tmp_path / "old", numbered([80, 90])))
        with pytest.raises(DataError, match=rf"^data\.sources\[0\]\.path: {old}: its tokenizer has no mask token"):
            MaskedText(Recipe.model_validate(masked(old)))


@pytest.fixture(scope="module")
def example(corpus: Path) -> tuple[dict[str, Any], MaskedBatch]:
    recipe = masked(corpus, batch={"tokens": 5 * SEQUENCE, "micro": 5})
    return recipe, batches_of(recipe, 0)[0]


class TestLoss:
    @pytest.mark.parametrize("chunk", [1, 7, 1000])
    def test_it_is_the_cross_entropy_of_what_was_hidden(
        self, example: tuple[dict[str, Any], MaskedBatch], chunk: int
    ) -> None:
        recipe, batch = example
        ours, plain = fresh_model(recipe), fresh_model(recipe)
        valid = torch.tensor(40.0)
        loss = MaskedLM(384, chunk_bytes=4 * 384 * chunk)(ours, batch, valid)
        loss.backward()
        logits = plain(batch.tokens).flatten(0, 1)
        expected = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum") / valid
        expected.backward()
        assert abs(loss.item() - expected.item()) < 1e-6
        for (name, one), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
            assert one.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)

    def test_only_places_to_predict_have_logits(self, example: tuple[dict[str, Any], MaskedBatch]) -> None:
        recipe, batch = example
        model, sizes = fresh_model(recipe), []
        plain = model.project

        def project(hidden: Tensor) -> Tensor:
            sizes.append(len(hidden))
            logits: Tensor = plain(hidden)
            return logits

        model.project = project  # type: ignore[method-assign]
        MaskedLM(384, chunk_bytes=4 * 384 * 10)(model, batch, torch.tensor(40.0)).backward()
        assert sum(sizes) == 5 * MaskingSpec().places(SEQUENCE) == 25
        assert max(sizes) == 10

    def test_a_step_executes_what_the_figures_count(self, example: tuple[dict[str, Any], MaskedBatch]) -> None:
        recipe, batch = example
        spec, model = Recipe.model_validate(recipe), fresh_model(recipe)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            MaskedLM(384)(model, batch, torch.tensor(40.0)).backward()
        counted = Arithmetic.of(check_recipe(spec), spec, None).model * batch.tokens.numel()
        assert counter.get_total_flops() == pytest.approx(counted, rel=1e-9)

    def test_a_micro_batch_of_padding_adds_nothing(self, corpus: Path) -> None:
        recipe = masked(corpus)
        spec, model = Recipe.model_validate(recipe), fresh_model(recipe)
        objective = MaskedTokens(spec, check_recipe(spec), World(0, 1, 0, 1, torch.device("cpu")), None)
        with objective.batches(0, 1, False) as batches:
            empty = batches.make([None, None])
        loss = objective.learn(model, empty, torch.tensor(9.0), None, lambda: None)
        assert loss.item() == 0.0
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


STEPS = 30
SCHEDULE = {"warmupTokens": 4 * SEQUENCES * SEQUENCE, "decayTokens": STEPS * SEQUENCES * SEQUENCE}


@pytest.mark.parametrize("preset", ["xlmr-tiny", "normformer-masked-tiny"])
def test_masked_models_learn(corpus: Path, tmp_path: Path, preset: str) -> None:
    recipe = masked(corpus, steps=STEPS, preset=preset, optimizer={"learningRate": 5e-3}, schedule=SCHEDULE)
    gang = Gang(tmp_path, recipe, world=1, checkpoint=False).run()
    losses = gang.losses()
    assert sum(losses[step] for step in range(STEPS - 4, STEPS + 1)) / 5 < losses[1] - 0.7
    assert gang.column("tokens")[2] == 2 * SEQUENCES * SEQUENCE
