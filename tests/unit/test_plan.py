"""`trireme plan`: memory against measured peaks, speed against published runs, and what the command says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trireme_api.carbon import PUBLISHED as FOOTPRINTS
from trireme_api.devices import BOARDS
from trireme_api.families import PRESETS
from trireme_api.families.growing import GrowingConfig
from trireme_api.planning import Plan, Setting, make
from trireme_api.planning.published import PUBLISHED, PublishedSpeed
from trireme_api.planning.speed import MODEL_ERROR, expected
from trireme_api.planning.traffic import of as traffic_of
from trireme_api.recipe import Recipe
from trireme_api.reliability import FAILURE_RATES
from trireme_cli import main as entry

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "plan"))

from plan_cases import Case, cases  # noqa: E402

STORED = sorted((ROOT / "benchmarks" / "results").glob("plan-memory-*.json"))
CASES = {case.name: case for case in cases()}


def recipe(preset: str = "opt-1.3b", **changes: Any) -> dict[str, Any]:
    return {
        "model": {"preset": preset},
        "data": {"sources": [{"path": "corpus"}], "sequenceLength": 2048},
        "batch": {"tokens": 524288, "micro": 8},
        "until": {"tokens": 30e9},
        **changes,
    }


def setting(preset: str = "opt-1.3b", gpus: int = 32, board: str = "h100", **changes: Any) -> Setting:
    return Setting.of(Recipe.model_validate(recipe(preset, **changes)), gpus, 8, BOARDS[board])


class TestMemory:
    @pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
    def test_within_a_tenth_of_every_measured_peak(self, path: Path) -> None:
        rows = json.loads(path.read_text())["cases"]
        assert {row["name"] for row in rows} == set(CASES), "run benchmarks/plan/measure.py again"
        off = {
            row["name"]: round(CASES[row["name"]].setting.memory().total / row["measured"] - 1, 3) for row in rows
        }
        assert {name: error for name, error in off.items() if abs(error) > 0.1} == {}

    def test_something_was_measured(self) -> None:
        assert STORED
        assert len(CASES) > 60

    def test_cases_differ_by_more_than_the_bound(self) -> None:
        """Else a constant would pass."""
        totals = [case.setting.memory().total for case in CASES.values()]
        assert max(totals) > 3 * min(totals)

    def test_parts_make_the_peak(self) -> None:
        memory = setting().memory()
        assert memory.total == sum(
            (memory.weights, memory.optimizer, memory.gradients, memory.activations, memory.unsharded)
        )
        assert memory.weights + memory.optimizer == pytest.approx(12 * 1_315_758_080 / 32, rel=1e-6)

    def test_what_shrinks_it(self) -> None:
        whole = setting().memory().total
        for less in (
            {"activationCheckpointing": True}, {"batch": {"tokens": 524288, "micro": 2}}, {"precision": "fp16"},
        ):  # fmt: skip
            assert setting(**less).memory().total <= whole, less
        assert setting(gpus=256).memory().total < whole
        assert setting(parallelism={"shard": "hybrid"}).memory().weights == 4 * setting().memory().weights

    def test_expert_parallelism_gathers_fewer_experts(self) -> None:
        gathered = [
            setting("moe-15b", gpus=64, parallelism={"expert": share}).memory().unsharded for share in (1, 8, 64)
        ]
        assert gathered[0] > 5 * gathered[1] > 10 * gathered[2]


    def test_tensor_parallelism_divides_what_a_block_gathers_and_keeps(self) -> None:
        batch = {"tokens": 524288, "micro": 1}
        one, eight = (setting("opt-30b", gpus=64, parallelism={"tensor": n}, batch=batch) for n in (1, 8))
        assert eight.micro_batch.tokens == one.micro_batch.tokens
        assert eight.share.micro_batches == 8 * one.share.micro_batches
        # Embeddings are gathered whole, logits are shared out, and the residual stream is on every rank.
        assert one.memory().unsharded > 3 * eight.memory().unsharded
        assert one.memory().activations > 2 * eight.memory().activations
        assert eight.memory().weights == pytest.approx(one.memory().weights, rel=1e-3)
        assert eight.memory().weights > one.memory().weights


class TestTraffic:
    def test_full_sharding_gathers_twice_and_reduces_once(self) -> None:
        one = setting(batch={"tokens": 32 * 2048, "micro": 1})
        total, root = 1_315_758_080, one.config.parameters().total - 24 * one.config.block_parameters()
        moved = traffic_of(one)
        assert moved.gathers == pytest.approx(2 * (2 * (total - root) + root) * 31 / 32)
        assert moved.reductions == pytest.approx(4 * total * 31 / 32)
        assert moved.inside == 0

    def test_hybrid_stays_inside_but_for_the_sum_of_shards(self) -> None:
        one = setting(parallelism={"shard": "hybrid"})
        moved = traffic_of(one)
        assert moved.outside == pytest.approx(2 * 3 / 4 * 4 * 1_315_758_080 / 8)
        assert moved.inside > 5 * moved.outside

    def test_a_tensor_group_sums_four_times_a_block_and_once_for_the_loss(self) -> None:
        one = setting(parallelism={"tensor": 8}, batch={"tokens": 4 * 2048, "micro": 1})
        moved, root = traffic_of(one), one.config.parameters().total - 24 * one.config.block_parameters()
        assert moved.sums == pytest.approx(2 * 7 / 8 * 2 * 2048 * 2048 * (4 * 24 + 1))
        assert moved.inside == moved.sums
        block = one.config.unit(0)
        gathered = (block.shared - block.undivided) / 8 + block.undivided
        assert moved.gathers == pytest.approx(2 * (2 * 24 * gathered * 3 / 4 + root * 31 / 32))

    def test_a_tensor_group_over_machines_pays_for_it(self) -> None:
        near, far = (expected(setting("opt-175b", gpus=64, parallelism={"tensor": n})) for n in (8, 16))
        assert near is not None
        assert far is not None
        assert far.traffic_seconds > 1.5 * near.traffic_seconds
        assert far.step_seconds > near.step_seconds

    def test_grad_op_talks_once_a_step(self) -> None:
        once = setting(parallelism={"shard": "grad-op"}, batch={"tokens": 32 * 2048, "micro": 1})
        often = setting(parallelism={"shard": "grad-op"}, batch={"tokens": 8 * 32 * 2048, "micro": 1})
        assert traffic_of(often).total == traffic_of(once).total

    def test_one_device_talks_to_nobody(self) -> None:
        assert traffic_of(setting(gpus=1)).total == 0

    def test_tokens_travel_to_experts(self) -> None:
        one = setting("moe-15b", gpus=64, parallelism={"expert": 64})
        rows = one.config.places(4 * 2048)  # type: ignore[attr-defined]
        assert traffic_of(one).tokens == pytest.approx(2 * 768 * rows * 4 * 6 * 63 / 64)


def as_published(run: PublishedSpeed) -> Setting:
    spec = recipe(
        "gpt-125m", batch={"tokens": run.gpus * run.micro * run.sequence_length, "micro": run.micro},
        data={"sources": [{"path": "corpus"}], "sequenceLength": run.sequence_length},
        activationCheckpointing=run.checkpointing,
    )  # fmt: skip
    return Setting(Recipe.model_validate(spec), run.config, run.gpus, 8, BOARDS[run.board])


class TestSpeed:
    @pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run.name}, {run.board}, {run.gpus}")
    def test_published_runs_are_within_the_stated_factor(self, run: PublishedSpeed) -> None:
        found = expected(as_published(run))
        assert found is not None
        ratio = found.tokens_per_second / run.gpus / run.tokens_per_second
        assert 1 / MODEL_ERROR <= ratio <= MODEL_ERROR, f"{ratio:.2f}"

    def test_some_were_held_back_from_the_fit(self) -> None:
        assert {run.board for run in PUBLISHED if not run.fitted} == {"a100-80", "h100"}

    def test_a_slow_network_binds(self) -> None:
        # One sequence a device between machines: collectives outlast the passes.
        slow = setting("opt-30b", gpus=512, board="l40s", batch={"tokens": 512 * 2048, "micro": 1})
        found = expected(slow)
        assert found is not None
        assert found.step_seconds > found.traffic_seconds > 2 * found.compute_seconds

    def test_no_peak_no_speed(self) -> None:
        on_cpu = Setting.of(Recipe.model_validate(recipe("opt-125m")), 2, 2, None)
        assert expected(on_cpu) is None
        found = expected(on_cpu, tflops=0.05)
        assert found is not None
        assert found.model_tflops == pytest.approx(0.05)
        assert found.mfu is None


class TestCosts:
    OPT_175B = setting(
        "opt-175b", gpus=992, board="a100-80", precision="fp16", activationCheckpointing=True,
        batch={"tokens": 992 * 2048, "micro": 1}, until={"tokens": 300e9},
    )  # fmt: skip

    def test_opt_175b_as_it_was(self) -> None:
        """34 days on 992 A100, 324 MWh, 1.6 TB checkpoints with fp16 weights, some 105 restarts in two months."""
        plan = make(self.OPT_175B)
        assert plan.training_seconds is not None
        assert plan.footprint is not None
        assert 25 < plan.training_seconds / 86400 < 40
        energy = plan.footprint.kilowatt_hours
        published = next(one for one in FOOTPRINTS if one.name == "OPT-175B").megawatt_hours
        assert published is not None
        assert energy.low < 1000 * published < energy.high
        assert plan.checkpoint.bytes == 12 * 174_604_468_224
        assert 10 < plan.failures[2].expected < plan.failures[0].expected < 120

    def test_failure_rates_are_the_papers(self) -> None:
        hours = {rate.name: rate.gpu_hours for rate in FAILURE_RATES}
        assert hours["Meta RSC"] / 1024 == pytest.approx(7.9)
        assert hours["Llama 3 405B"] == pytest.approx(50_700, rel=0.01)
        assert list(hours.values()) == sorted(hours.values())

    def test_goodput_falls_with_size(self) -> None:
        small, large = (make(setting(gpus=gpus, batch={"tokens": 2**25, "micro": 1})) for gpus in (32, 16384))
        assert large.failures[0].goodput < small.failures[0].goodput < 1
        # Llama 3 reports more than 90 % at 16,384.
        assert large.failures[2].goodput > 0.9

    def test_ranges_hold_their_middle(self) -> None:
        found = make(setting()).footprint
        assert found is not None
        for one in (found.watts, found.kilowatt_hours, found.operational_grams, found.embodied_grams):
            assert one.low < one.mid < one.high


class TestFitting:
    def test_what_would_fit_does(self) -> None:
        plan = make(setting("opt-13b", gpus=16, board="a100-40"))
        assert plan.own.fits is False
        assert "activationCheckpointing: true" in plan.remedies
        assert setting("opt-13b", gpus=16, board="a100-40", activationCheckpointing=True).fits()

    def test_more_devices_where_nothing_else_helps(self) -> None:
        plan = make(setting("opt-175b", gpus=8, board="a100-80"))
        assert len(plan.remedies) == 1
        assert plan.remedies[0].startswith("64 devices, with parallelism.shard: full")
        assert not setting(
            "opt-175b", gpus=32, board="a100-80", activationCheckpointing=True, batch={"tokens": 524288, "micro": 1}
        ).fits()

    def test_says_when_no_number_of_devices_helps(self) -> None:
        (line,) = make(setting("opt-175b", gpus=8, board="l4")).remedies
        assert line.startswith("nothing here:")
        assert "more memory" in line

    def test_the_recipe_comes_first_and_nothing_twice(self) -> None:
        rows = make(setting(parallelism={"shard": "grad-op"})).rows
        assert [row.own for row in rows] == [True] + [False] * (len(rows) - 1)
        names = [row.name for row in rows]
        assert names[0] == "grad-op"
        assert len(set(names)) == len(names) == 6


class TestFewShot:
    """Several passes over the same examples make a step; a task's examples stay on one rank."""

    def few(self, gpus: int = 8, micro: int = 160, **few: Any) -> Setting:
        return setting(
            "opt-125m", gpus=gpus, objective="few-shot", fewShot={"examples": 20, **few},
            data={"sources": [{"path": "tasks://path-finding"}], "sequenceLength": 42},
            batch={"tokens": 64 * 20 * 42, "micro": micro},
        )  # fmt: skip

    def test_every_pass_costs_what_a_pass_costs(self) -> None:
        one, four = self.few(innerSteps=1), self.few(innerSteps=4)
        once, often = expected(one), expected(four)
        assert once is not None
        assert often is not None
        assert often.compute_seconds == pytest.approx(4 * once.compute_seconds)
        assert traffic_of(four).total == pytest.approx(4 * traffic_of(one).total)
        assert make(four).flops.model == pytest.approx(4 * make(one).flops.model)

    def test_final_reduces_gradients_once_and_gathers_for_every_pass(self) -> None:
        sums, last = (self.few(innerSteps=4, outerGrad=outer) for outer in ("accumulate", "final"))
        assert (sums.passes, last.passes) == (4, 5)
        assert traffic_of(last).gathers == pytest.approx(5 / 4 * traffic_of(sums).gathers)
        assert traffic_of(last).reductions == pytest.approx(traffic_of(sums).reductions / 4)
        # Four passes for embeddings alone leave out the weights' third.
        assert make(last).flops.model == pytest.approx((4 * 2 / 3 + 1) / 4 * make(sums).flops.model)

    def test_gradients_wait_between_passes_that_reach_the_weights(self) -> None:
        sums, last = (self.few(innerSteps=4, outerGrad=outer).memory() for outer in ("accumulate", "final"))
        assert sums.gradients == sums.weights
        assert last.gradients < sums.gradients
        assert (last.weights, last.optimizer) == (sums.weights, sums.optimizer)

    def test_tasks_are_dealt_whole(self) -> None:
        assert self.few(micro=50).micro_sequences == 40
        assert self.few(micro=1).micro_sequences == 20
        odd = self.few(gpus=48)
        assert (odd.share.per_rank, odd.micro_sequences) == (2, 40)

    def test_it_has_time_energy_and_carbon(self) -> None:
        found = make(self.few())
        assert found.wall_seconds is not None
        assert found.footprint is not None
        assert found.footprint.kilowatt_hours.mid > 0
        assert any(line.startswith("evaluation: in no figure") for line in found.assumptions)
        assert not any(line.startswith("evaluation") for line in make(setting()).assumptions)


class TestGrowth:
    """`anytime` with `growEvery`: the model in the end decides what must fit, each size what it costs."""

    def stream(self, **anytime: int) -> Setting:
        stream = {"sources": [{"path": "stream-{n}"}], "sequenceLength": 2048}
        return setting(
            "growing-125m", gpus=8, data=stream, until={"steps": 1000}, anytime={"megaBatches": 5, **anytime}
        )

    def alone(self, splits: str, steps: int) -> Plan:
        model = {"preset": "growing-125m", "overrides": {"splits": splits}}
        return make(setting(gpus=8, model=model, until={"steps": steps}))

    def test_it_is_a_run_of_each_size(self) -> None:
        found = make(self.stream(growEvery=2))
        alone = [
            self.alone(";".join([splits] * 12) if splits else "", steps)
            for splits, steps in (("", 400), ("0", 400), ("0,0", 200))
        ]
        assert found.training_seconds == pytest.approx(sum(one.training_seconds or 0 for one in alone))
        assert found.flops.model * 1000 == pytest.approx(
            sum(one.flops.model * one.setting.recipe.total_steps for one in alone)
        )
        assert found.own.memory == alone[-1].own.memory
        assert found.checkpoint.bytes == alone[-1].checkpoint.bytes > 1.9 * alone[0].checkpoint.bytes

    def test_any_expert_may_be_split(self) -> None:
        base = PRESETS["growing-tiny"].config
        assert isinstance(base, GrowingConfig)
        one, other = base.grown(3), base.split((0, 0)).split((1, 0)).split((2, 1))
        assert base.grown(0) == base
        assert (one.growths, one.parameters()) == (other.growths, other.parameters())
        assert one.train_flops_per_token(64) == other.train_flops_per_token(64)

    def test_a_stream_that_does_not_grow_is_a_plain_run(self) -> None:
        found, plain = make(self.stream()), self.alone("", 1000)
        assert (found.training_seconds, found.own.memory) == (plain.training_seconds, plain.own.memory)
        assert any(line.startswith("stream: waiting for data") for line in found.assumptions)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        entry.main(["plan", *args])
    return int(ended.value.code or 0)


class TestCommand:
    def test_a_job(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(str(ROOT / "manifests/samples/opt-1.3b.yaml")) == 0
        out = capsys.readouterr().out
        for part in ("* hybrid 8 + checkpointing", "32 x h100 on 4 nodes", "fits", "goodput", "CO2e", "Assumed:",
                     "none is named with --gpu, so h100", "Sweden"):  # fmt: skip
            assert part in out, part

    @pytest.mark.parametrize("path", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_sample(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if path.stem == "kustomization":
            return
        code = run(str(path), "--json")
        if path.stem == "custom-script":
            assert code == 64
            assert "your own script has none" in capsys.readouterr().err
            return
        found = json.loads(capsys.readouterr().out)
        assert code == 0
        assert found["shardings"][0]["own"] is True
        assert (found["device"] == "cpu") == ("cpu" in path.stem)
        assert (found["footprint"] is None) == (found["device"] == "cpu")
        assert found["wouldFit"] == []

    def test_passes_of_a_few_shot_step_are_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(str(ROOT / "manifests/samples/tam-125m.yaml")) == 0
        assert "1 x 160 sequences of 42, 4 passes each" in capsys.readouterr().out

    def test_a_recipe_on_named_devices(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe("opt-175b")))
        assert run(str(file), "--gpu", "a100-80", "--gpus", "16") == 0
        out = capsys.readouterr().out
        assert "16 x a100-80 on 2 nodes" in out
        assert "DOES NOT FIT" in out
        assert "64 devices" in out

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            (recipe("opt-1.4b"), [], "model.preset: unknown preset 'opt-1.4b'; did you mean"),
            (recipe(parallelism={"expert": 2}), [], "parallelism.expert: must be 1 for opt-1.3b"),
            (recipe("moe-15b", parallelism={"expert": 16}), ["--gpus", "8"], "16 does not divide 8 ranks"),
            (recipe(parallelism={"tensor": 4}), ["--gpus", "6"], "parallelism.tensor: 4 does not divide 6 ranks"),
            (recipe(parallelism={"tensor": 5}), ["--gpus", "10"], "parallelism.tensor: must divide heads of opt-1.3b"),
            (recipe(), ["--gpu", "h300"], "'h300' is not one of"),
            ({"spec": {}, "kind": "TrainingJob"}, [], "metadata.name"),
        ],
    )
    def test_bad_input_is_one_line(
        self, content: dict[str, Any], options: list[str], message: str, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(content))
        assert run(str(file), *options) == 64
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert message in err


def test_a_case_is_what_it_says() -> None:
    one: Case = CASES["moe-tiny (experts 8), 4 ranks, expert 2, bf16, 1 x 2, checkpointing, no dropout"]
    assert one.setting.spread.experts == 2
    assert one.setting.spread.activation_checkpointing
    assert one.setting.micro_batch.tokens == 256
