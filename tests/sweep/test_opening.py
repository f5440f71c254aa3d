"""The first trials of a Bayesian sweep: pytest tests/sweep/test_opening.py"""

from typing import Any

import pytest

from job.sweep.distributions import Params
from job.sweep.observations import Observation
from tests.sweep.test_builtin import CARD, RATE, WIDE, ask, sweep_of

USUAL = {"gradient_accumulation_steps": 4, "lora_dropout": 0.05, "weight_decay": 0.01}
TOP = 1.0e-3  # of the wide sweep
LARGE = USUAL | {"lora_r": 32, "lora_alpha": 32}
SMALL = USUAL | {"lora_r": 8, "lora_alpha": 16}


def seen(*trials: tuple[Params, float | None, str]) -> list[Observation]:
    return [Observation(slot, *told) for slot, told in enumerate(trials)]  # type: ignore[arg-type]


def observe(params: Params, loss: float | None, status: str = "completed") -> Any:
    return (params, status, loss)


def wide(slot: int, observations: list[Observation], **others: Any) -> Params:
    params = ask(WIDE, slot, observations, **others)
    assert params is not None
    return params


def test_ladder_is_a_third_all_and_a_ninth_of_the_highest_rate_at_the_settings_values() -> None:
    for slot, rate in enumerate([6.66667e-5, 2.0e-4, 2.22222e-5]):
        assert ask(CARD, slot) == USUAL | {"learning_rate": rate}


def test_ladder_and_probe_of_the_wide_sweep_are_at_the_largest_and_the_smallest_adapter() -> None:
    told: list[Any] = []
    for slot, (rate, loss) in enumerate([(TOP / 3, 1.1), (TOP, 1.05), (TOP / 9, 1.2)]):
        params = wide(slot, seen(*told))
        assert params == LARGE | {"learning_rate": pytest.approx(rate, rel=1e-5)}
        told.append(observe(params, loss))
    assert wide(3, seen(*told)) == SMALL | {"learning_rate": TOP}, "the best of the three rates"


def test_ladder_stays_at_the_largest_rank_whose_adapter_may_be_uploaded() -> None:
    assert [wide(0, [], largest_rank=rank)["lora_r"] for rank in (None, 32, 31, 8, 3)] == [
        *(32, 32, 16, 8),
        8,  # none fits: the trial itself will say so
    ]


def test_ladder_takes_the_nearest_allowed_value_where_a_setting_is_not_allowed() -> None:
    space = {"learning_rate": RATE, "weight_decay": {"values": [0.05, 0.1]}}
    assert (ask(sweep_of("bayes", space), 0) or {})["weight_decay"] == 0.05


def test_ladder_drops_rates_below_the_range() -> None:
    definition = sweep_of("bayes", {"learning_rate": RATE | {"min": 1.0e-4}})
    assert ask(definition, 0) == {"learning_rate": 2.0e-4}
    assert ask(definition, 1) == ask(
        sweep_of("random", {"learning_rate": RATE | {"min": 1.0e-4}}), 1
    ), "there is no size to probe, and no loss to learn from"


def test_without_a_log_scale_of_rates_the_settings_values_come_first() -> None:
    space = {"learning_rate": {"min": 1.0e-5, "max": 1.0e-3}, "lora_r": {"values": [8, 16]}}
    definition = sweep_of("bayes", space)
    assert ask(definition, 0) == {"learning_rate": 2e-4, "lora_r": 16}
    assert ask(definition, 1) == {"learning_rate": 2e-4, "lora_r": 8}, "the probe"


def test_probe_of_a_sweep_whose_first_four_trials_start_at_once() -> None:
    told = [observe(wide(slot, []), None, "running") for slot in range(3)]
    assert wide(3, seen(*told)) == SMALL | {"learning_rate": pytest.approx(TOP / 3, rel=1e-5)}


def test_a_rate_worse_than_no_training_is_divided_by_ten_before_the_ladder_goes_on() -> None:
    first = observe(wide(0, []), 1.6)
    second = wide(1, seen(first))
    assert second == LARGE | {"learning_rate": pytest.approx(TOP / 30, rel=1e-5)}
    better = observe(second, 1.1)
    assert wide(2, seen(first, better))["learning_rate"] == pytest.approx(TOP / 9, rel=1e-5)


def test_diverged_rates_are_divided_until_the_lowest_and_no_further() -> None:
    told = [observe(wide(0, []), None, "diverged")]
    rates = []
    for slot in range(1, 4):
        params = wide(slot, seen(*told), step0_loss=None)
        rates.append(params["learning_rate"])
        told.append(observe(params, None, "diverged"))
    assert rates[0] == pytest.approx(TOP / 30, rel=1e-5)
    assert rates[1] == 3.0e-5, "the lowest allowed"
    assert rates[2] not in rates[:2]


def test_an_adapter_that_does_not_fit_the_gpu_is_followed_by_the_smallest() -> None:
    first = wide(0, [])
    assert wide(1, seen(observe(first, None, "infeasible"))) == SMALL | {
        "learning_rate": first["learning_rate"]
    }


def test_the_ladder_goes_on_below_a_rank_that_did_not_fit() -> None:
    first = observe(wide(0, []), None, "infeasible")
    second = observe(wide(1, seen(first)), 1.1)
    third = wide(2, seen(first, second))
    assert (third["lora_r"], third["lora_alpha"]) == (16, 32)


def test_warm_start_takes_the_second_place_and_nothing_else() -> None:
    known = {"learning_rate": 4e-4, "lora_r": 12, "lora_alpha": 32, "lora_dropout": 0.07}
    assert wide(1, [], warm_start=known) == {
        "learning_rate": 4e-4,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "gradient_accumulation_steps": 4,
        "weight_decay": 0.01,
    }
    for slot in (0, 2):
        assert wide(slot, [], warm_start=known) == wide(slot, [])


def test_an_alpha_that_is_a_range_of_floats_has_ends_too() -> None:
    space = {"learning_rate": RATE, "lora_alpha": {"min": 8.0, "max": 64.5}}
    definition, told = sweep_of("bayes", space), []  # type: ignore[var-annotated]
    for slot in range(7):
        params = ask(definition, slot, seen(*told))
        assert params is not None
        told.append(observe(params, 1.2 - 0.01 * slot))
    assert [params["lora_alpha"] for params, *_ in told[:4]] == [64.5, 64.5, 64.5, 8.0]
    assert len({tuple(params.items()) for params, *_ in told}) == 7
