"""The training benchmark's cases are recipes that can run, on any device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "train"))
from cases import Case, for_cpu, for_gpu


@pytest.mark.parametrize("case", [*for_cpu(), *for_gpu(1), *for_gpu(8)], ids=lambda case: f"{case.name} {case.ranks}")
def test_a_case_is_a_recipe_with_its_shape(case: Case) -> None:
    recipe = Recipe.model_validate(case.recipe(Path("/corpus")))
    check_recipe(recipe)
    assert recipe.sequences_per_step == case.ranks * case.accumulate * case.micro
    assert recipe.total_steps == case.steps > case.warm >= 1


def test_names_tell_cases_of_a_matrix_apart() -> None:
    for matrix in (for_cpu(), for_gpu(1), for_gpu(8)):
        assert len({case.name for case in matrix}) == len(matrix)
