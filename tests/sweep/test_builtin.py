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

from job.sweep.builtin import most_trials, suggest, why_nothing_left
from job.sweep.definition import SweepDefinition, load_definition, parse_definition
from job.sweep.distributions import Params, contains, num_points
from job.sweep.observations import Observation

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
    **others: Any,
) -> Params | None:
    return suggest(
        definition,
        slot=slot,
        sweep=sweep,
        observations=observations,
        step0_loss=step0_loss,
        defaults=DEFAULTS,
        **others,
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
    optional={
        "lora_r": RANKS,
        "lora_alpha": RANKS,
        "lora_dropout": DROPOUTS,
        "lr_scheduler": SCHEDULERS,
        "weight_decay": st.just({"distribution": "log_uniform_values", "min": 1.0e-3, "max": 0.1}),
        "gradient_accumulation_steps": st.just({"values": [4, 8]}),
        "max_grad_norm": st.just({"values": [0.3, 1.0]}),
    },
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


RATE = {"distribution": "log_uniform_values", "min": 5.0e-6, "max": 2.0e-4}


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


FEW = {"lora_r": {"values": [8, 16]}, "lora_dropout": {"values": [0.05, 0.1]}}


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        (sweep_of("random", {"learning_rate": RATE}), None),
        (sweep_of("random", {"learning_rate": RATE}, run_cap=2), (2, "the sweep's run_cap is 2")),
        (sweep_of("grid", FEW), (4, "the grid has 4 points")),
        (sweep_of("grid", FEW, run_cap=3), (3, "the sweep's run_cap is 3")),
        (sweep_of("grid", FEW, run_cap=9), (4, "the grid has 4 points")),
        (sweep_of("random", FEW), (4, "the sweep has 4 points")),
        (sweep_of("bayes", FEW), (4, "the sweep has 4 points")),
        (sweep_of("bayes", {"lora_r": {"value": 8}}), (1, "the sweep has 1 point")),
    ],
)
def test_how_many_trials_a_sweep_can_draw_is_known_and_so_is_which_slot_gets_none(
    definition: SweepDefinition, says: tuple[int, str] | None
) -> None:
    assert most_trials(definition) == says
    for first in (0, 3):  # slots are drawn in any order
        seen: list[Observation] = []
        for slot in [*range(first, 6), *range(first)]:
            why = why_nothing_left(definition, slot=slot, observations=seen)
            params = ask(definition, slot, seen)
            assert (params is None) == (why is not None)
            if why is not None:
                assert says is not None
                assert why == says[1]
            else:
                assert params is not None
                seen.append(Observation(slot, params, "running", None))
        assert len(seen) == (6 if says is None else says[0])


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
