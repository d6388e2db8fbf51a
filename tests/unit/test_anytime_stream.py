"""The stream of `recipe.anytime`: its arithmetic, and what of a recipe is refused."""

from __future__ import annotations

from typing import Any

import pytest
from trireme_api.anytime import AnytimeSpec, Stream
from trireme_api.job import InvalidSpecs, parse_spec
from trireme_api.recipe import Recipe
from trireme_api.validation import check_recipe


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"preset": "growing-tiny"},
        "data": {"sources": [{"path": "pvc://stream/mega-{n}"}], "sequenceLength": 64},
        "anytime": {"megaBatches": 4, "arrived": 1},
        "batch": {"tokens": 640},
        "until": {"steps": 40},
        **changes,
    }


@pytest.mark.parametrize(
    ("wait_for", "grow_every", "sessions"),
    [
        (1, 0, [("1", 0, 10, 0), ("2", 10, 20, 0), ("3", 20, 30, 0), ("4", 30, 40, 0)]),
        (1, 1, [("1", 0, 10, 0), ("2", 10, 20, 1), ("3", 20, 30, 2), ("4", 30, 40, 3)]),
        (1, 2, [("1", 0, 10, 0), ("2", 10, 20, 0), ("3", 20, 30, 1), ("4", 30, 40, 1)]),
        (2, 1, [("12", 0, 20, 0), ("34", 20, 40, 1)]),
        (3, 1, [("123", 0, 30, 0), ("4", 30, 40, 1)]),
        (4, 1, [("1234", 0, 40, 0)]),
        (9, 0, [("1234", 0, 40, 0)]),
    ],
)
def test_sessions(wait_for: int, grow_every: int, sessions: list[tuple[str, int, int, int]]) -> None:
    stream = Stream(AnytimeSpec(mega_batches=4, wait_for=wait_for, grow_every=grow_every), 40)
    found = [("".join(map(str, s.new)), s.first_step, s.end_step, s.growths) for s in stream]
    assert found == sessions
    assert len(stream) == len(sessions)


@pytest.mark.parametrize(("batches", "steps", "wait_for"), [(3, 10, 1), (7, 7, 2), (5, 1003, 4), (1, 1, 1)])
def test_every_step_is_in_one_session(batches: int, steps: int, wait_for: int) -> None:
    stream = Stream(AnytimeSpec(mega_batches=batches, wait_for=wait_for), steps)
    sessions = list(stream)
    assert [s.first_step for s in sessions] == [0, *(s.end_step for s in sessions[:-1])]
    assert sessions[-1].end_step == steps
    assert [n for s in sessions for n in s.new] == list(range(1, batches + 1))
    for step in range(steps):
        at = stream.at(step)
        assert at.first_step <= step < at.end_step
        assert stream.begins(step) == (step == at.first_step)
        assert stream.trained(step) == sum(len(s.new) for s in sessions if s.end_step <= step)
        assert stream.needed(step) == max(at.new)
    assert stream.trained(steps) == batches
    assert not stream.begins(steps)


def test_the_data_of_a_session() -> None:
    spec = Recipe.model_validate(recipe(anytime={"megaBatches": 4, "waitFor": 2, "replay": 0.4}))
    assert spec.stream is not None
    first, second = (spec.of_session(session).data.sources for session in spec.stream)
    assert [(s.path, s.weight) for s in first] == [("pvc://stream/mega-1", 0.5), ("pvc://stream/mega-2", 0.5)]
    assert [(s.path[-1], round(s.weight, 6)) for s in second] == [("1", 0.2), ("2", 0.2), ("3", 0.3), ("4", 0.3)]


def test_several_sources_keep_their_proportions() -> None:
    sources = [{"path": "pvc://s/en-{n}", "weight": 3.0}, {"path": "pvc://s/de-{n}"}]
    spec = Recipe.model_validate(recipe(data={"sources": sources, "sequenceLength": 64}))
    assert spec.stream is not None
    found = spec.of_session(spec.stream.session(1)).data.sources
    assert [(s.path, s.weight) for s in found] == [("pvc://s/en-2", 3.0), ("pvc://s/de-2", 1.0)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"sources": [{"path": "pvc://stream/all"}], "sequenceLength": 64}}, "write {n} where the number"),
        ({"anytime": {"megaBatches": 2, "arrived": 3}}, "anytime.arrived must be at most megaBatches, 2; got 3"),
        ({"until": {"steps": 3}}, "at least one step for each of the 4"),
        ({"stability": {"onSpike": "rollback"}}, "rollback goes not with anytime"),
        (
            {"data": {"sources": [{"path": "pvc://s/{n}"}], "mixture": {"alpha": 0.3}, "sequenceLength": 64}},
            "data.mixture goes not with anytime",
        ),
        ({"stability": {"onNonFinite": "rollback"}}, "rollback goes not with anytime"),
        ({"anytime": {"megaBatches": 2, "replay": 1.0}}, "less than 1"),
        ({"anytime": {"megaBatches": 2, "waitfor": 1}}, "did you mean 'waitFor'?"),
        (
            {"anytime": {"megaBatches": 2, "growEvery": 1}, "model": {"preset": "gpt-tiny"}},
            "anytime.growEvery: gpt-tiny cannot grow; set 0, or one of these as preset: growing-tiny, growing-125m, "
            "growing-ensemble-tiny",
        ),
        (
            {"anytime": {"megaBatches": 2, "growEvery": 1}, "model": {"preset": "ensemble-tiny"}},
            "anytime.growEvery: ensemble-tiny cannot grow; set 0, or one of these as preset: growing-tiny",
        ),
        (
            {"model": {"preset": "growing-ensemble-tiny", "overrides": {"members": 3}}},
            "model.overrides.members: must be 1 for growing-ensemble-tiny, whose newest member alone is trained: 2 ",
        ),
        (
            {"model": {"preset": "ensemble-tiny", "overrides": {"trains": "oldest"}}},
            "model.overrides.trains: ",
        ),
        ({"model": {"preset": "ensemble-tiny", "overrides": {"members": 0}}}, "model.overrides.members: "),
    ],
)
def test_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    job = {"recipe": recipe(**changes), "checkpoint": {"uri": "pvc://c/d"}}
    try:
        found = [str(problem) for problem in check_recipe(parse_spec(job).recipe, "spec.recipe")]  # type: ignore[arg-type]
    except InvalidSpecs as error:
        found = [str(problem) for problem in error.found]
    assert len(found) == 1
    assert says in found[0]
    assert "\n" not in found[0]


def test_the_memory_tier_is_refused() -> None:
    with pytest.raises(InvalidSpecs, match=r"checkpoint.memory goes not with recipe.anytime"):
        parse_spec({"recipe": recipe(), "checkpoint": {"uri": "pvc://c/d", "memory": {}}})
