"""Steps, evaluations, learning rates and seeds as functions.

`pytest tests/training/test_recipe.py`
"""

from __future__ import annotations

import json

import pytest

from job.ledger.records import Recipe
from job.training.recipe import derive_seed, learning_rate_at, plan_evaluations, plan_steps
from tests.tiny_model import make_recipe


def test_the_cards_epoch_is_1500_steps_of_8() -> None:
    assert plan_steps(12_000, 8, max_steps=1500, num_epochs=1) == 1500
    assert plan_steps(12_000, 16, max_steps=1500, num_epochs=1) == 750
    assert plan_steps(12_000, 8, max_steps=100, num_epochs=3) == 100
    assert plan_steps(3, 8, max_steps=100, num_epochs=1) == 1


def test_accumulation_4_and_8_are_judged_after_the_same_samples() -> None:
    four, eight = plan_evaluations(1500, 8), plan_evaluations(750, 8)
    assert len(four) == len(eight) == 8
    assert four[-1] == 1500
    assert all(abs(8 * a - 16 * b) <= 16 for a, b in zip(four, eight, strict=True))


def test_a_short_trial_has_no_evaluation_twice() -> None:
    assert plan_evaluations(3, 8) == (1, 2, 3)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_warm_up_rises_from_zero_and_the_rest_never_rises(scheduler: str) -> None:
    recipe = make_recipe(lr_scheduler=scheduler, warmup_ratio=0.25, planned_steps=20)
    rates = [learning_rate_at(recipe, step) for step in range(20)]
    assert rates[0] == 0
    assert max(rates) == rates[5] == recipe.learning_rate
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert scheduler == "constant" or rates[-1] < 0.1 * recipe.learning_rate


def test_a_recipe_survives_json() -> None:
    recipe = make_recipe()
    assert Recipe.model_validate(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_seeds_differ_and_stay() -> None:
    assert derive_seed(17, "step", 1) == 2101197125439157540
    assert len({derive_seed(s, kind, i) for s in (1, 11) for kind in "ab" for i in (1, 11)}) == 8
