"""The built-in sweep engine, as a pure function of what slots said.

`pytest tests/sweep/test_builtin.py`
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.sweep.builtin import Observation, Params, suggest, told_losses
from job.sweep.definition import SweepDefinition, load_definition, parse_definition
from job.sweep.distributions import contains, num_points

ROOT = Path(__file__).parents[2]
CARD = load_definition(ROOT / "job" / "sweep" / "sweep.yaml")
WIDE = load_definition(ROOT / "job" / "sweep" / "sweep-wide.yaml")
DEFAULTS = {
    "learning_rate": 2e-4,
    "gradient_accumulation_steps": 4,
    "lora_dropout": 0.05,
    "weight_decay": 0.01,
    "lora_r": 8,
    "lora_alpha": 16,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.03,
    "max_grad_norm": 1.0,
}
STEP0_LOSS = 1.4


def sweep_of(method: str, parameters: dict[str, Any], **others: Any) -> SweepDefinition:
    metric = {"name": "eval/loss", "goal": "minimize"}
    return parse_definition({"method": method, "metric": metric, "parameters": parameters} | others)


def ask(
    definition: SweepDefinition,
    slot: int,
    observations: Sequence[Observation] = (),
    *,
    sweep: str = "s",
    step0_loss: float | None = STEP0_LOSS,
) -> Params | None:
    return suggest(
        definition,
        slot=slot,
        sweep=sweep,
        observations=observations,
        step0_loss=step0_loss,
        defaults=DEFAULTS,
    )


def loss_of(params: Any) -> float:
    """A loss shaped as LoRA's is in the rate: a parabola in its log, the optimum at 8e-5."""
    distance = math.log10(params["learning_rate"] / 8e-5)
    return 1.0 + 0.06 * distance**2 + 0.002 * (params["gradient_accumulation_steps"] == 8)


def trials(definition: SweepDefinition, sweep: str, num_trials: int) -> list[Observation]:
    """Trials one after another, with the noise between two seeds of a real one (0.7 milli-nats)."""
    noise = random.Random(sweep)
    seen: list[Observation] = []
    for slot in range(num_trials):
        params = ask(definition, slot, seen, sweep=sweep)
        assert params is not None
        seen.append(Observation(slot, params, "completed", loss_of(params) + noise.gauss(0, 7e-4)))
    return seen


def assert_in_domain(definition: SweepDefinition, params: Params | None) -> None:
    assert params is not None
    assert params.keys() == definition.parameters.keys()
    for name, domain in definition.parameters.items():
        assert contains(domain, params[name]), f"{name}: {params[name]!r} is not in {domain}"
        if num_points(domain) is None:
            assert type(params[name]) is float


# Every kind of domain, for the property tests.
RATES = st.sampled_from(
    [
        {"distribution": "log_uniform_values", "min": 5.0e-6, "max": 2.0e-4},
        {"distribution": "log_uniform_values", "min": 1.23456789e-4, "max": 1.23456799e-4},
        {"distribution": "log_uniform", "min": -12, "max": -8.5},
        {"min": 1.0e-5, "max": 1.0e-3},
        {"values": [1.0e-4, 2.0e-4, 1.0e-3]},
        {"value": 1.0e-4},
    ]
)
RANKS = st.sampled_from(
    [
        {"values": [32, 8, 16]},
        {"values": [8, 16], "probabilities": [0.9, 0.1]},
        {"min": 8, "max": 64},
        {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8},
        {"distribution": "q_log_uniform_values", "min": 1, "max": 64},
        {"value": 8},
    ]
)
DROPOUTS = st.sampled_from(
    [
        {"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.05},
        {"min": 0.0, "max": 0.3},
        {"values": [0, 0.1]},
    ]
)
SCHEDULERS = st.sampled_from([{"values": ["cosine", "linear"]}, {"value": "constant"}])
SPACES = st.fixed_dictionaries(
    {"learning_rate": RATES},
    optional={"lora_r": RANKS, "lora_dropout": DROPOUTS, "lr_scheduler": SCHEDULERS},
)


@settings(max_examples=50, deadline=None)
@given(SPACES, st.integers(0, 10_000), st.sampled_from(["s", "t-2", "ü"]))
def test_random_points_lie_in_the_domain(space: dict[str, Any], slot: int, sweep: str) -> None:
    definition = sweep_of("random", space)
    assert_in_domain(definition, ask(definition, slot, sweep=sweep))


@settings(max_examples=50, deadline=None)
@given(SPACES, st.integers(0, 3))
def test_first_bayes_points_lie_in_the_domain(space: dict[str, Any], slot: int) -> None:
    definition = sweep_of("bayes", space)
    assert_in_domain(definition, ask(definition, slot))


def test_ladder_is_a_third_all_and_a_ninth_of_the_highest_rate_at_the_defaults() -> None:
    usual = {"gradient_accumulation_steps": 4, "lora_dropout": 0.05, "weight_decay": 0.01}
    for slot, rate in enumerate([6.66667e-5, 2.0e-4, 2.22222e-5]):
        assert ask(CARD, slot) == usual | {"learning_rate": rate}


def test_ladder_takes_the_nearest_allowed_value_where_a_default_is_not_allowed() -> None:
    space = {"learning_rate": RATE, "lora_r": {"values": [64, 32]}, "lora_alpha": {"value": 64}}
    first = ask(sweep_of("bayes", space), 0)
    assert first is not None
    assert (first["lora_r"], first["lora_alpha"]) == (32, 64)


RATE = {"distribution": "log_uniform_values", "min": 5.0e-6, "max": 2.0e-4}


def test_ladder_drops_rates_below_the_range_and_goes_on_at_random() -> None:
    definition = sweep_of("bayes", {"learning_rate": RATE | {"min": 1.0e-4}})
    assert ask(definition, 0) == {"learning_rate": 2.0e-4}
    drawn = ask(definition, 1)
    assert drawn == ask(sweep_of("random", {"learning_rate": RATE | {"min": 1.0e-4}}), 1)


def test_there_is_no_ladder_without_a_log_scale() -> None:
    space = {"learning_rate": {"min": 1.0e-5, "max": 1.0e-3}}
    assert ask(sweep_of("bayes", space), 0) == ask(sweep_of("random", space), 0)


def test_slot_after_the_ladder_is_random_whatever_was_seen() -> None:
    assert ask(CARD, 3) == ask(CARD, 3, [observed(0, 1.0), observed(1, 1.1)])


def observed(slot: int, loss: float | None, status: str = "completed") -> Observation:
    params = ask(CARD, slot)
    assert params is not None
    return Observation(slot, params, status, loss)


def test_slots_draw_different_points_and_one_slot_always_the_same() -> None:
    definition = sweep_of("random", {"learning_rate": RATE})
    points = [ask(definition, slot) for slot in range(200)]
    assert len({point["learning_rate"] for point in points if point}) == 200
    assert points == [ask(definition, slot) for slot in range(200)]
    assert ask(definition, 0, sweep="other") != points[0]


def test_order_of_names_does_not_matter() -> None:
    turned = sweep_of("random", dict(reversed(CARD.to_json()["parameters"].items())))
    assert ask(turned, 5) == ask(sweep_of("random", CARD.to_json()["parameters"]), 5)


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_no_point_of_another_slot_is_suggested_again(method: str) -> None:
    definition = sweep_of(method, {"lora_r": {"values": [8, 16, 32]}, "lora_alpha": {"value": 16}})
    seen: list[Observation] = []
    for slot in range(3):
        params = ask(definition, slot, seen)
        assert params is not None
        seen.append(Observation(slot, params, "running", None))
    assert {o.params["lora_r"] for o in seen} == {8, 16, 32}
    assert ask(definition, 3, seen) is None, "nothing is left to try"


def test_own_earlier_observation_does_not_move_a_slot() -> None:
    definition = sweep_of("random", {"lora_r": {"values": [8, 16, 32]}})
    first = ask(definition, 0)
    assert first is not None
    assert ask(definition, 0, [Observation(0, first, "running", None)]) == first


def test_nothing_is_suggested_past_the_run_cap() -> None:
    definition = sweep_of("random", {"learning_rate": RATE}, run_cap=2)
    assert ask(definition, 1) is not None
    assert ask(definition, 2) is None


def test_grid_is_every_combination_once_in_wandbs_order_then_none() -> None:
    space = {
        "lora_r": {"values": [16, 8]},
        "lora_alpha": {"min": 16, "max": 18},
        "lora_dropout": {"distribution": "q_uniform", "min": 0.0, "max": 0.1, "q": 0.1},
        "lr_scheduler": {"value": "cosine"},
    }
    definition = sweep_of("grid", space)
    points = [ask(definition, slot) for slot in range(12)]
    expected = [
        {"lora_alpha": alpha, "lora_dropout": dropout, "lora_r": r, "lr_scheduler": "cosine"}
        for alpha in (16, 17, 18)  # by name, the last turning fastest
        for dropout in (0.0, 0.1)
        for r in (16, 8)
    ]
    assert points == expected
    assert ask(definition, 12) is None


def test_told_loss_is_never_above_the_untrained_one() -> None:
    seen = [
        observed(0, 1.2),
        observed(1, 3.0, "truncated"),
        observed(2, 1.1, "diverged"),
        observed(3, None, "infeasible"),
        observed(4, None, "running"),
        observed(5, math.nan, "stopped"),
    ]
    told = {o.slot: loss for o, loss in told_losses(seen, 1.4)}
    assert told == {0: 1.2, 1: 1.4, 2: 1.4, 3: 1.4, 5: 1.4}


def test_failed_trials_count_as_the_worst_loss_while_the_untrained_one_is_unknown() -> None:
    seen = [observed(0, 1.2), observed(1, 3.0), observed(2, None, "diverged")]
    assert {o.slot: loss for o, loss in told_losses(seen, None)} == {0: 1.2, 1: 3.0, 2: 3.0}
    assert told_losses(seen[2:], None) == []
