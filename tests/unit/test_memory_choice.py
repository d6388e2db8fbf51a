"""Which set of shards in memory is chosen, and who gives what to whom: pure logic, before any byte moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import Scene
from test_operator_pods import RECIPE, env, made, mounts
from trireme_agent.attempt import held_in_memory
from trireme_agent.environment import rank_environment
from trireme_api.job import InvalidSpecs, parse_spec
from trireme_api.layout import MEMORY_DIR, memory_limit
from trireme_api.protocol import Action, AgentState, Assignment, CheckpointRef, Env, FailureCount, MemoryShards, Report
from trireme_api.quantity import parse_quantity
from trireme_api.shards import Shard, by_set, newest_whole, parse_shard
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.gang import places

SHARD = st.builds(
    lambda step, attempt, world, rank: Shard(step, attempt, world, rank % world),
    st.integers(0, 10**10), st.integers(0, 10**6), st.integers(1, 20_000), st.integers(0, 10**6),
)  # fmt: skip


@given(SHARD)
def test_names_are_read_back(shard: Shard) -> None:
    assert parse_shard(str(shard)) == shard


@pytest.mark.parametrize(
    "name",
    [
        "fence.json", "working-0-own", "spare-0-own", "step-00000004",
        "step-00000004.attempt-1.rank-00003-of-00003.shard",
    ],
)
def test_other_names_are_no_shards(name: str) -> None:
    assert parse_shard(name) is None


def held(*shards: tuple[int, int, int, int]) -> list[MemoryShards]:
    return by_set(Shard(step, attempt, world, rank) for step, attempt, world, rank in shards)


def test_the_newest_whole_set_across_pods() -> None:
    pods = [
        held((8, 1, 3, 0), (6, 1, 3, 0), (6, 1, 3, 2)),
        held((8, 1, 3, 1), (6, 1, 3, 1), (8, 1, 3, 0)),
    ]
    best = newest_whole((part for pod in pods for part in pod), 3)
    assert best is not None
    assert (best.step, best.attempt, best.ranks) == (6, 1, [0, 1, 2])
    third = held((8, 1, 3, 2))
    best = newest_whole((part for pod in (*pods, third) for part in pod), 3)
    assert best is not None
    assert best.step == 8


def test_attempts_and_world_sizes_are_never_mixed() -> None:
    assert newest_whole(held((8, 1, 2, 0), (8, 2, 2, 1)), 2) is None
    assert newest_whole(held((8, 1, 2, 0), (8, 1, 2, 1)), 3) is None
    best = newest_whole(held((8, 1, 1, 0), (8, 2, 1, 0)), 1)
    assert best is not None
    assert best.attempt == 2
    assert newest_whole([], 1) is None


def test_the_agent_tells_what_the_pod_holds(tmp_path: Path) -> None:
    for name in ("fence.json", "working-0-own", *map(str, (Shard(4, 1, 2, 1), Shard(4, 1, 2, 0), Shard(6, 1, 2, 0)))):
        (tmp_path / name).touch()
    parts = held_in_memory(str(tmp_path))
    assert [(part.step, part.ranks) for part in parts] == [(6, [0]), (4, [0, 1])]
    report = Report("uid", 1, AgentState.WAITING, memory=parts)
    assert Report.from_json(report.to_json()) == report
    assert held_in_memory(str(tmp_path / "nothing")) == []
    assert held_in_memory(None) == []


# --- the operator's choice ------------------------------------------------------------------------------------------

CHECKPOINT = {"uri": "pvc://work/out", "everySteps": "auto", "memory": {"everySteps": 5}}


def recovering(pods: list[list[MemoryShards]], stored: int | None) -> Crew:
    """Two pods at the barrier of attempt 1, holding `pods`; storage is at `stored`."""
    scene = Scene(recipe=RECIPE, checkpoint=CHECKPOINT, template={})
    scene.settle()
    scene.create_all()
    scene.settle()
    scene.hear_all(AgentState.WAITING)
    for heard, parts in zip(scene.heard.values(), pods, strict=True):
        heard.report.memory = parts
    if stored is not None:
        scene.obj["status"]["resumeFrom"] = {"step": stored, "path": "pvc://work/out/step"}
    return Crew(scene.job, places(scene.job, scene.seen()))


@pytest.mark.parametrize(
    ("stored", "chosen"), [(None, 6), (4, 6), (6, 6), (8, None)], ids=["no storage", "older", "the same", "newer"]
)
def test_the_newest_tier_is_chosen(stored: int | None, chosen: int | None) -> None:
    crew = recovering([held((6, 3, 2, 0), (8, 3, 2, 0)), held((6, 3, 2, 1))], stored)
    told = crew.assignment("pod-0-1")
    assert told.action == Action.RUN
    assert (told.memory.step if told.memory else None) == chosen
    assert told.resume is None or told.resume.step == stored
    if chosen is not None:
        assert told.memory == CheckpointRef(6, "memory of attempt 3")


def test_an_incomplete_set_is_not_chosen() -> None:
    assert recovering([held((6, 3, 2, 0)), []], None).assignment("pod-0-1").memory is None


def test_ranks_are_told() -> None:
    told = Assignment(
        2, Action.RUN, memory=CheckpointRef(6, "memory of attempt 1"), failures=FailureCount(3, 60.0)
    )
    paths = {"heartbeat_dir": "/h", "stop_file": "/s", "error_file": "/e", "log_dir": "/l"}
    env_of = rank_environment({Env.RESUME_MEMORY: "stale", Env.MEMORY_DIR: "/m"}, told, 0, **paths)
    assert env_of[Env.RESUME_MEMORY] == '{"step": 6, "path": "memory of attempt 1"}'
    assert env_of[Env.FAILURES] == '{"count": 3, "seconds": 60.0}'
    assert env_of[Env.MEMORY_DIR] == "/m"
    bare = rank_environment({Env.RESUME_MEMORY: "stale", Env.FAILURES: "stale"}, Assignment(2, Action.RUN), 0, **paths)
    assert Env.RESUME_MEMORY not in bare
    assert Env.FAILURES not in bare


# --- the pod --------------------------------------------------------------------------------------------------------


def test_the_pod_has_the_folder_only_when_asked() -> None:
    pod = made(recipe=RECIPE, checkpoint=CHECKPOINT, template={})
    (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "trireme-memory"]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert parse_quantity(volume["emptyDir"]["sizeLimit"]) > 64 * 2**20
    assert mounts(pod)[MEMORY_DIR] == {"name": "trireme-memory", "mountPath": MEMORY_DIR}
    assert env(pod)[Env.MEMORY_DIR] == MEMORY_DIR
    without = made(recipe=RECIPE, checkpoint={"uri": "pvc://work/out"}, template={})
    assert MEMORY_DIR not in mounts(without)
    assert Env.MEMORY_DIR not in env(without)


def test_the_limit_follows_from_the_model() -> None:
    def limit(replicas: int = 4, procs: int = 2, least: int | None = None, **memory: object) -> float:
        recipe = {**RECIPE, "model": {"preset": "opt-125m"}, **memory.pop("recipe", {})}  # type: ignore[dict-item]
        spec = parse_spec(
            {
                "recipe": recipe, "replicas": {"desired": replicas, "min": least}, "procsPerNode": procs,
                "checkpoint": {"uri": "pvc://a/b", "memory": memory},
            }
        )  # fmt: skip
        found = memory_limit(spec)
        assert found is not None
        return parse_quantity(found) - 64 * 2**20

    state = 12 * 125_239_296  # OPT-125M: 12 bytes of state per parameter
    # A quarter of it, twice, own and one copy, a tenth to spare.
    assert limit() == pytest.approx(state / 4 * 2 * 2 * 1.1, rel=0.01)
    assert limit(replicas=1) == pytest.approx(state * 2 * 1.1, rel=0.01), "one node has nobody to keep copies for"
    hybrid = {"parallelism": {"shard": "hybrid"}}
    assert limit(recipe=hybrid) == pytest.approx(state * 2 * 2 * 1.1, rel=0.01), "each node holds the whole state"
    assert limit(least=2) == pytest.approx(state / 2 * 2 * 2 * 1.1, rel=0.01), "it may shrink to two nodes"
    assert limit(size="3Gi") == 3 * 2**30 - 64 * 2**20


def test_a_script_of_ones_own_has_no_tier_in_memory() -> None:
    template = {"image": "i", "command": ["c"]}
    with pytest.raises(InvalidSpecs, match=r"checkpoint\.memory is the trainer's"):
        parse_spec({"template": template, "checkpoint": {"uri": "pvc://a/b", "memory": {}}})
    with pytest.raises(InvalidSpecs, match="quantity"):
        parse_spec({"recipe": RECIPE, "checkpoint": {"uri": "pvc://a/b", "memory": {"size": "much"}}})
