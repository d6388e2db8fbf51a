"""Schedule, metering, device peaks, step log, heartbeat and settings of the trainer: pure parts, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trireme_api.devices import device_peak
from trireme_api.families import resolve
from trireme_api.heartbeat import Heartbeat
from trireme_api.protocol import SPENT_STATES, Cause, CheckpointRef, Env, Progress, Report, Spent
from trireme_api.recipe import ModelSpec, Recipe
from trireme_trainer.lifecycle.outcome import BadRecipe
from trireme_trainer.optimization.schedule import learning_rate
from trireme_trainer.settings import Settings
from trireme_trainer.telemetry import metering
from trireme_trainer.telemetry.heartbeat import Pulse, process_start
from trireme_trainer.telemetry.ledger import Ledger
from trireme_trainer.telemetry.logbook import Logbook
from trireme_trainer.telemetry.metering import Arithmetic, Figures, Meter

OPT_125M: dict[str, Any] = {
    "model": {"preset": "opt-125m"},
    "data": {"sources": [{"path": "/data"}]},
    "batch": {"tokens": 524288, "micro": 8},
    "until": {"tokens": 180e9},
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**OPT_125M, **changes})


class TestSchedule:
    """OPT §2.2 with its own numbers: 375M tokens of warm-up to 6e-4, 10 % at 300B."""

    OPT = recipe(schedule={"warmupTokens": 375e6, "decayTokens": 300e9, "finalFraction": 0.1})

    @pytest.mark.parametrize(
        ("tokens", "rate"),
        [
            (0, 0.0),
            (375e6 / 2, 3e-4),
            (375e6, 6e-4),
            ((375e6 + 300e9) / 2, 6e-4 * 0.55),
            (300e9, 6e-5),
            (400e9, 6e-5),
        ],
    )
    def test_points_of_the_paper(self, tokens: float, rate: float) -> None:
        assert learning_rate(self.OPT, tokens) == pytest.approx(rate, rel=1e-12, abs=1e-18)

    def test_the_first_step_is_not_wasted_and_the_last_is_the_last(self) -> None:
        r = recipe(schedule={"warmupTokens": 524288 * 10}, until={"steps": 100})
        rates = [learning_rate(r, (step + 1) * 524288) for step in range(100)]
        assert rates[0] == pytest.approx(6e-5)
        assert max(rates) == rates[9] == pytest.approx(6e-4)
        assert rates[-1] == pytest.approx(6e-5)
        assert rates[9:] == sorted(rates[9:], reverse=True)

    def test_without_decay_tokens_it_ends_where_training_ends(self) -> None:
        r = recipe(schedule={"warmupTokens": 0, "finalFraction": 0.0}, until={"steps": 4})
        assert [learning_rate(r, n * 524288) for n in (0, 2, 4)] == pytest.approx([6e-4, 3e-4, 0.0])

    def test_constant_stays(self) -> None:
        r = recipe(schedule={"warmupTokens": 524288, "decay": "constant"}, until={"steps": 4})
        assert [learning_rate(r, n * 524288) for n in (1, 2, 400)] == [6e-4] * 3

    def test_a_warm_up_that_outlasts_training_goes_on_to_its_end(self) -> None:
        r = recipe(schedule={"warmupTokens": 375e6}, until={"steps": 10})
        assert learning_rate(r, 10 * 524288) == pytest.approx(6e-4 * 10 * 524288 / 375e6)
        assert learning_rate(r, 375e6) == 6e-4


class TestArithmetic:
    H100 = device_peak("NVIDIA H100 80GB HBM3")
    CONFIG = resolve(ModelSpec(preset="opt-125m"))

    def test_figures_by_hand(self) -> None:
        """125M at T = 2048, 2 devices, 1M tokens in 2 s: 250k tokens/s/device."""
        figures = Arithmetic.of(self.CONFIG, recipe(), self.H100).figures(1e6, 2.0, 4, 2)
        d, layers, vocabulary, T = 768, 12, 50272, 2048
        forward = layers * (2 * 12 * d * d + 4 * d * (T + 1) / 2) + 2 * vocabulary * d
        assert figures.tokens_per_second == 500_000
        assert figures.step_seconds == 0.5
        assert figures.model_tflops == pytest.approx(250_000 * 3 * forward / 1e12, rel=1e-12)
        assert figures.mfu == pytest.approx(250_000 * 3 * forward / 989.4e12, rel=1e-12)
        palm = 6 * (125_239_296 - 2050 * d) + 12 * layers * d * T
        assert figures.mfu_palm == pytest.approx(250_000 * palm / 989.4e12, rel=1e-12)
        assert figures.hfu == figures.mfu

    def test_recomputation_raises_hfu_alone(self) -> None:
        plain = Arithmetic.of(self.CONFIG, recipe(), self.H100).figures(1e6, 1.0, 1, 1)
        again = Arithmetic.of(self.CONFIG, recipe(activationCheckpointing=True), self.H100).figures(1e6, 1.0, 1, 1)
        assert (again.mfu, again.mfu_palm, again.model_tflops) == (plain.mfu, plain.mfu_palm, plain.model_tflops)
        assert again.hfu is not None
        assert plain.hfu is not None
        assert again.hfu > 1.1 * plain.hfu

    def test_an_unknown_device_has_no_utilisation(self) -> None:
        figures = Arithmetic.of(self.CONFIG, recipe(), device_peak("cpu")).figures(1e6, 1.0, 1, 1)
        assert (figures.mfu, figures.mfu_palm, figures.hfu) == (None, None, None)
        assert figures.model_tflops is not None

    def test_nothing_measured_is_nothing_said(self) -> None:
        assert Arithmetic.of(self.CONFIG, recipe(), self.H100).figures(0, 0.0, 0, 1) == Figures()


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51.2e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A10G", None, 31.5e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("Tesla T4", None, 8.1e12),
    ],
)
def test_peaks_by_the_names_drivers_give(name: str, bf16: float | None, fp32: float) -> None:
    peak = device_peak(name)
    assert peak is not None
    assert (peak.of("bf16"), peak.of("fp32")) == pytest.approx((bf16, fp32))
    assert peak.source


@pytest.mark.parametrize("name", ["cpu", "NVIDIA A1000", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "H1000", ""])
def test_a_device_that_only_looks_alike_is_unknown(name: str) -> None:
    assert device_peak(name) is None


class TestMeter:
    def test_steady_state_leaves_out_first_step_checkpoints_and_evaluation(self) -> None:
        clock = [100.0]
        ledger = Ledger(clock=lambda: clock[0])
        meter = Meter(Arithmetic(model=2e9, hardware=3e9, palm=4e9, peak=1e12), devices=2, ledger=ledger)
        clock[0] += 50  # start-up, before the loop
        meter.begin()
        with ledger.during("data-wait"):
            clock[0] += 4
        clock[0] += 26
        assert meter.step_done(1000) == 30
        assert meter.figures() == Figures()
        for _ in range(3):
            clock[0] += 1.5
            with ledger.during("data-wait"):
                clock[0] += 0.5
            with ledger.during("checkpoint-blocked"):
                clock[0] += 7
            with ledger.during("eval"):
                clock[0] += 11
            assert meter.step_done(1000) == 2
        figures = meter.figures()
        assert figures.tokens_per_second == 500
        assert figures.step_seconds == 2
        assert figures.model_tflops == pytest.approx(250 * 2e9 / 1e12)
        assert figures.mfu == pytest.approx(0.5)
        assert figures.hfu == pytest.approx(0.75)
        assert meter.seconds == {
            "init": 50.0, "step": 4.5, "compile": 26.0, "data-wait": 5.5, "checkpoint-blocked": 21.0, "eval": 33.0,
            "recovering": 0.0, "lost": 0.0,
        }  # fmt: skip
        assert sum(meter.seconds.values()) == clock[0] - 100

    def test_figures_are_of_the_newest_steps(self) -> None:
        clock = [0.0]
        meter = Meter(Arithmetic(1, 1, 1, None), devices=1, ledger=Ledger(clock=lambda: clock[0]))
        meter.begin()
        for seconds in [1.0] * 5 + [4.0] * metering.WINDOW:
            clock[0] += seconds
            meter.step_done(8)
        assert meter.figures().tokens_per_second == 2


class TestLedger:
    @settings(max_examples=200)
    @given(st.lists(st.tuples(st.sampled_from(["pass", "enter", "open", "close", "save", "back"]), st.integers(0, 6))))
    def test_states_sum_to_the_wall_time_whatever_happens(self, moves: list[tuple[str, int]]) -> None:
        clock = [10.0]
        ledger = Ledger(clock=lambda: clock[0])
        open_ones = ExitStack()
        for step, (move, which) in enumerate(moves):
            if move == "pass":
                clock[0] += which
            elif move == "enter":
                ledger.enter(SPENT_STATES[which])
            elif move == "open":
                open_ones.enter_context(ledger.during(SPENT_STATES[which]))
            elif move == "close":
                open_ones.close()
            elif move == "save":
                ledger.saving(step)
                ledger.committed(step)
            else:
                ledger.rolled_back(which)
            assert sum(ledger.seconds.values()) == pytest.approx(clock[0] - 10.0)
            assert min(ledger.seconds.values()) >= 0
            told = Spent.from_json(json.loads(json.dumps(ledger.told().to_json())))
            assert sum(told.seconds.values()) == pytest.approx(clock[0] - 10.0, abs=0.01)

    def test_an_episode_inside_another_counts_once_and_an_error_ends_it(self) -> None:
        clock = [0.0]
        ledger = Ledger(clock=lambda: clock[0])
        ledger.enter("step")
        with suppress(OSError), ledger.during("checkpoint-blocked"):
            clock[0] += 2
            with ledger.during("data-wait"):
                clock[0] += 1
            raise OSError("full")
        clock[0] += 3
        seconds = ledger.seconds
        assert (seconds["checkpoint-blocked"], seconds["data-wait"], seconds["step"]) == (2, 1, 3)
        with pytest.raises(ValueError, match="no ledger state 'idle'; there are init, compile"):
            ledger.enter("idle")

    def test_what_passed_before_it_was_made_is_init(self) -> None:
        assert Ledger(started=time.time() - 7).seconds["init"] == pytest.approx(7, abs=0.5)

    def test_a_rollback_loses_the_time_of_the_steps_since(self) -> None:
        clock = [0.0]
        ledger = Ledger(clock=lambda: clock[0])
        ledger.resumed(100)
        ledger.enter("step")
        for step in range(101, 131):
            clock[0] += 1
            ledger.stepped(step)
            if step % 10 == 0:
                ledger.saving(step)
        ledger.committed(110)
        ledger.committed(120)
        assert (ledger.told().saved_step, ledger.told().saved_seconds) == (120, 20.0)
        ledger.rolled_back(110)
        told = ledger.told()
        assert (told.seconds["step"], told.seconds["lost"], told.step, told.from_step) == (10.0, 20.0, 110, 100)
        assert told.saved_step is None


class TestLogbook:
    def rows(self, directory: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]

    def test_attempts_append_and_are_told_apart(self, tmp_path: Path) -> None:
        for attempt in (1, 2):
            with Logbook(str(tmp_path / "new"), attempt) as book:
                book.step(step=3, loss=float(attempt))
                book.event("resumed", step=2)
        rows = self.rows(tmp_path / "new")
        assert [(row["attempt"], row.get("loss"), row.get("event")) for row in rows] == [
            (1, 1.0, None), (1, None, "resumed"), (2, 2.0, None), (2, None, "resumed"),
        ]  # fmt: skip

    def test_a_torn_line_of_a_killed_attempt_spoils_only_itself(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
        with Logbook(str(tmp_path), 2) as book:
            book.step(step=2)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert lines[1] == '{"step": 2, "lo'
        assert json.loads(lines[2])["step"] == 2

    def test_an_object_store_gets_a_part_per_flush(self) -> None:
        import fsspec

        book = Logbook("memory://logbook/dir", 4)
        book.step(step=1)
        book.flush()
        book.flush()
        book.step(step=2)
        book.step(step=3)
        book.close()
        store = fsspec.filesystem("memory")
        parts = sorted(path for path in store.ls("/logbook/dir", detail=False) if "attempt-4.part-" in path)
        rows = [[json.loads(line)["step"] for line in store.cat_file(path).decode().splitlines()] for path in parts]
        assert rows == [[1], [2, 3]]

    def test_a_log_that_cannot_be_written_does_not_end_training(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with Logbook(str(tmp_path / "file"), 1) as book:
            book.step(step=1)
        with Logbook(None, 1) as book:
            book.step(step=1)


class TestPulse:
    def test_every_beat_is_a_whole_heartbeat(self, tmp_path: Path) -> None:
        pulse = Pulse(tmp_path / "new", local_rank=2, rank=6, attempt=3, started=process_start())
        pulse.reached("imported")
        pulse.beat("rendezvous")
        pulse.reached("rendezvous")
        pulse.reached("first_step")
        pulse.beat("step", step=5, progress=Progress(step=5, loss=1.5), checkpoint=CheckpointRef(4, "/c/4"))
        pulse.beat("checkpoint")
        beat = Heartbeat.from_json(json.loads((tmp_path / "new" / "rank-2.json").read_text()))
        assert (beat.step, beat.phase, beat.attempt) == (5, "checkpoint", 3)
        assert beat.progress == Progress(step=5, loss=1.5)
        assert beat.checkpoint == CheckpointRef(4, "/c/4")
        assert beat.phases is not None
        assert beat.phases.started is not None
        assert beat.phases.first_step is not None
        assert beat.phases.started < beat.phases.first_step <= beat.time
        assert beat.spent is not None
        assert sum(beat.spent.seconds.values()) == pytest.approx(beat.time - beat.phases.started, abs=0.1)
        pulse.reached("rendezvous")
        assert list(pulse.startup_seconds()) == ["imported", "rendezvous", "first_step"]
        pulse.fail(Cause.DATA, "shard gone\x07", exit_code=65)
        told = json.loads((tmp_path / "new" / "rank-2.json").read_text())["failure"]
        assert (told["cause"], told["message"], told["rank"], told["exit"]) == ("data", "shard gone?", 6, 65)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["rank-2.json"]

    def test_neighbouring_versions_understand_each_other(self) -> None:
        """An older agent tells no `spent`, a newer one more than we know."""
        assert Report.from_json({"podUid": "u", "attempt": 1, "state": "running"}).spent is None
        newer = {"podUid": "u", "attempt": 1, "state": "running", "spent": {"seconds": {"idle": 1}, "mood": "good"}}
        assert Report.from_json(newer).spent == Spent({"idle": 1.0})

    def test_a_vanished_directory_does_not_end_training(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        Pulse(tmp_path / "file" / "x", local_rank=0, rank=0, attempt=0, started=0.0).beat("step")
        Pulse(None, local_rank=0, rank=0, attempt=0, started=0.0).beat("step")

    def test_it_reports_even_when_nothing_else_is_right(self, tmp_path: Path) -> None:
        env = {Env.HEARTBEAT_DIR: str(tmp_path), Env.RANK: "many", Env.LOCAL_RANK: "-1"}
        Pulse.from_environment(env, 0.0).fail(Cause.USER_ERROR, "RANK", exit_code=64)
        assert (tmp_path / "rank-0.json").exists()


class TestSettings:
    ENV = {Env.RECIPE: json.dumps(OPT_125M)}  # noqa: RUF012

    def test_alone_without_a_launcher(self) -> None:
        settings = Settings.from_environment(self.ENV)
        assert (settings.rank, settings.world_size, settings.checkpoint, settings.metrics_port) == (0, 1, None, None)

    def test_as_the_agent_starts_it(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(
            "model: {preset: opt-8m}\ndata: {sources: [{path: d}], sequenceLength: 4}\nbatch: {tokens: 8}\n"
            "until: {steps: 2}\n"
        )
        env = {
            Env.RECIPE: str(tmp_path / "recipe.yaml"), Env.RANK: "3", Env.WORLD_SIZE: "4", Env.MASTER_ADDR: "10.0.0.1",
            Env.MASTER_PORT: "29401", Env.ATTEMPT: "2", Env.CHECKPOINT: '{"uri": "pvc://c/d", "everySteps": 7}',
            Env.JOB: "j", Env.NAMESPACE: "n", Env.JOB_UID: "u",
        }  # fmt: skip
        settings = Settings.from_environment(env)
        assert settings.recipe.model.preset == "opt-8m"
        assert settings.checkpoint is not None
        assert (settings.checkpoint.every_steps, settings.owner, settings.attempt) == (7, "u", 2)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({Env.RECIPE: ""}, "TRIREME_RECIPE: is required"),
            ({Env.RECIPE: "/no/such.yaml"}, "cannot read '/no/such.yaml': No such file"),
            ({Env.RECIPE: "{a: b: c"}, "TRIREME_RECIPE: neither JSON nor YAML"),
            ({Env.RECIPE: '{"model": {}}'}, "model.preset: is required"),
            ({Env.CHECKPOINT: '{"uri": "x", "kep": 2}'}, "kep: unknown field; did you mean 'keep'?"),
            ({Env.WORLD_SIZE: "0"}, "WORLD_SIZE: must be a whole number of at least 1, got '0'"),
            ({Env.RANK: "1"}, "RANK: must be below WORLD_SIZE = 1"),
            ({Env.WORLD_SIZE: "2"}, "MASTER_ADDR and MASTER_PORT: are required"),
            ({Env.COMPILE_BACKEND: "tvm"}, "TRIREME_COMPILE_BACKEND: must be one of inductor"),
            ({Env.STEP_TIMEOUT: "soon"}, "TRIREME_STEP_TIMEOUT: must be seconds"),
        ],
    )
    def test_what_is_wrong_is_named_in_one_line(self, change: dict[str, str], says: str) -> None:
        with pytest.raises(BadRecipe) as caught:
            Settings.from_environment({**self.ENV, **change})
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_these_parts_do_not_import_torch() -> None:
    names = (
        "settings telemetry.heartbeat lifecycle.outcome optimization.schedule telemetry.metering telemetry.ledger "
        "telemetry.logbook lifecycle.stop __main__"
    )
    imports = ", ".join(f"trireme_trainer.{name}" for name in names.split())
    subprocess.run([sys.executable, "-c", f"import sys, {imports}; assert 'torch' not in sys.modules"], check=True)
