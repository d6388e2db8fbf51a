"""`trireme run` without processes: what it decides, and how a recipe and options become an environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_corpus import numbered, write_corpus
from trireme_api.job import parse_spec
from trireme_api.protocol import Action, AgentState, Assignment, Cause, Env, Failure, Progress, Report
from trireme_api.schema import InvalidSpec
from trireme_cli.local_coordinator import LocalCoordinator, Restart, decide
from trireme_cli.local_display import describe, duration
from trireme_cli.local_plan import Options, next_attempt, note_attempt, plan_command, plan_recipe, read_recipe

RECIPE: dict[str, Any] = {
    "model": {"preset": "opt-8m"},
    "data": {"sources": [{"path": "corpus"}], "sequenceLength": 64},
    "batch": {"tokens": 1024},
    "until": {"steps": 10},
}


def failed(cause: Cause, step: int = 0, attempt: int = 1) -> Restart:
    return Restart(Failure(cause, "x"), attempt, step)


@pytest.mark.parametrize(
    ("cause", "step", "before", "restart"),
    [
        (Cause.UNKNOWN, 5, [], True),
        (Cause.USER_ERROR, 5, [], False),
        (Cause.DATA, 5, [], False),
        (Cause.OOM, 5, [failed(Cause.OOM, 5)], True),
        (Cause.OOM, 5, [failed(Cause.OOM, 5), failed(Cause.OOM, 5)], False),
        (Cause.OOM, 6, [failed(Cause.OOM, 5), failed(Cause.OOM, 5)], True),
        (Cause.OOM, 5, [failed(Cause.OOM, 5), failed(Cause.HANG, 5)], True),
        (Cause.OOM, 9, [failed(Cause.OOM, i) for i in range(4)], False),
    ],
)
def test_restart_or_not(cause: Cause, step: int, before: list[Restart], restart: bool) -> None:
    verdict = decide(Failure(cause, "x"), step, before, 4)
    assert verdict.restart is restart
    assert verdict.reason


@pytest.fixture
def coordinator():
    made = LocalCoordinator(procs=2, first_attempt=7, max_restarts=1, grace_seconds=9.0, on_event=lambda _: None)
    yield made
    made.close()


def tell(coordinator: LocalCoordinator, state: AgentState, attempt: int, **fields: Any) -> Assignment:
    return coordinator.answer(Report("uid", attempt, state, **fields), 0.0)


def test_hold_then_run_then_restart_then_stop(coordinator: LocalCoordinator) -> None:
    first = tell(coordinator, AgentState.WAITING, 0)
    assert (first.attempt, first.action, first.procs_per_node) == (7, Action.HOLD, 2)
    running = tell(coordinator, AgentState.WAITING, 7)
    assert running.action is Action.RUN
    assert running.grace_seconds == 9.0
    failure = Failure(Cause.UNKNOWN, "boom")
    assert tell(coordinator, AgentState.STOPPING, 7, failure=failure).attempt == 7, "ranks may still be alive"
    again = tell(coordinator, AgentState.EXITED, 7, failure=failure, progress=Progress(step=5))
    assert (again.attempt, again.action) == (8, Action.HOLD)
    assert again.master_port != first.master_port
    assert tell(coordinator, AgentState.EXITED, 7, failure=failure).attempt == 8, "told twice, judged once"
    tell(coordinator, AgentState.WAITING, 8)
    assert tell(coordinator, AgentState.EXITED, 8, failure=failure).action is Action.STOP
    assert coordinator.view.restarts == 1
    assert [f.attempt for f in coordinator.view.failures] == [7, 8]


def test_a_stop_request_is_final(coordinator: LocalCoordinator) -> None:
    tell(coordinator, AgentState.WAITING, 7)
    coordinator.request_stop()
    assert tell(coordinator, AgentState.RUNNING, 7).action is Action.SAVE_AND_STOP
    answer = tell(coordinator, AgentState.EXITED, 7, failure=Failure(Cause.UNKNOWN, "x"))
    assert (answer.attempt, answer.action) == (7, Action.SAVE_AND_STOP)
    coordinator.request_kill()
    assert tell(coordinator, AgentState.RUNNING, 7).action is Action.STOP


def recipe_file(folder: Path, data: Any) -> Path:
    path = folder / "My Recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_ranks_that_the_recipe_cannot_arrange_are_refused_before_any_starts(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, {**RECIPE, "parallelism": {"expert": 2}})
    with pytest.raises(InvalidSpec, match=r"parallelism.expert: 2 does not divide 3 ranks; start a multiple of 2"):
        plan_recipe(path, Options(nproc=3), {})


def test_a_recipe_becomes_the_environment_of_the_agent(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data" / "corpus", numbered([100]))
    options = Options(nproc=2, data_root=tmp_path / "data", directory=tmp_path / "out", every=5)
    inherited = {"PATH": "/bin", "TRIREME_ATTEMPT": "3"}
    plan = plan_recipe(recipe_file(tmp_path, RECIPE), options, inherited)
    env = plan.environment
    assert (plan.name, plan.command, env["PATH"]) == ("my-recipe", [], "/bin")
    assert Env.ATTEMPT not in env, "what an outer agent set is not passed on"
    assert json.loads(env[Env.RECIPE])["data"]["sources"][0]["path"] == str(tmp_path / "data" / "corpus")
    checkpoint = json.loads(env[Env.CHECKPOINT])
    assert (checkpoint["uri"], checkpoint["everySteps"]) == (str(tmp_path / "out" / "checkpoints"), 5)
    assert not (tmp_path / "out").exists(), "planning makes nothing"


def test_a_training_job_serves_as_a_recipe_and_claims_are_mapped(tmp_path: Path) -> None:
    spec = {
        "recipe": {**RECIPE, "data": {"sources": [{"path": "pvc://corpus/en"}], "sequenceLength": 64}},
        "checkpoint": {"uri": "pvc://checkpoints/a", "everySteps": 7},
    }
    parse_spec(spec)
    path = recipe_file(tmp_path, {"kind": "TrainingJob", "spec": spec})
    with pytest.raises(InvalidSpec, match="--pvc corpus=DIR") as error:
        plan_recipe(path, Options(nproc=1), {})
    assert error.value.field == "data.sources[0].path"
    (tmp_path / "checkpoints").mkdir()
    write_corpus(tmp_path / "corpus" / "en", numbered([100]))
    claims = {"corpus": tmp_path / "corpus", "checkpoints": tmp_path / "checkpoints"}
    plan = plan_recipe(path, Options(nproc=1, claims=claims), {})
    root = Path(plan.environment[Env.PVC_ROOT])
    assert (root / "corpus").resolve() == (tmp_path / "corpus").resolve()
    assert json.loads(plan.environment[Env.CHECKPOINT])["everySteps"] == 7
    plan = plan_recipe(path, Options(nproc=1, claims=claims, checkpoint="memory://a"), {})
    assert json.loads(plan.environment[Env.CHECKPOINT])["uri"] == "memory://a"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**RECIPE, "batsh": 1}, "batsh: unknown field; did you mean 'batch'"),
        ({**RECIPE, "batch": {"tokens": 1000}}, "must be a multiple"),
        ([1, 2], "must hold a recipe"),
        ({"kind": "TrainingJob", "spec": {"template": {"image": "a", "command": ["b"]}}}, "your own script"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, data: Any, words: str) -> None:
    with pytest.raises((InvalidSpec, ValueError), match=words):
        read_recipe(recipe_file(tmp_path, data))


def test_an_own_command(tmp_path: Path) -> None:
    plan = plan_command(["python", "src/my_script.py", "--lr", "1"], Options(nproc=3), {})
    assert (plan.name, plan.command[-1], plan.environment[Env.PROCS_PER_NODE]) == ("my-script", "1", "3")
    assert Env.RECIPE not in plan.environment
    assert Env.CHECKPOINT not in plan.environment


def test_attempts_of_a_directory_only_rise(tmp_path: Path) -> None:
    owner, attempt = next_attempt(tmp_path / "run")
    assert attempt == 1
    note_attempt(tmp_path / "run", owner, 4)
    assert next_attempt(tmp_path / "run") == (owner, 5)
    (tmp_path / "run" / "run.json").write_text("torn")
    other, attempt = next_attempt(tmp_path / "run")
    assert (other != owner, attempt) == (True, 1)


def test_progress_in_words() -> None:
    progress = Progress(step=5, total_steps=10, tokens=500, loss=2.5, tokens_per_second=100.0)
    assert describe(progress) == "step 5/10  loss 2.5000  100 tok/s  0:05 left"
    assert describe(Progress(step=3)) == "step 3"
    assert (duration(59.9), duration(3661)) == ("0:59", "1:01:01")
