"""Advice of `job plan`, and when a sweep will end. `pytest tests/plan/test_advice.py`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import job
from job.plan import advice
from job.plan.sections import describe_end
from job.report.gain import Outlook, outlook_of
from job.report.overview import Overview
from job.settings import Settings
from job.sweep.definition import SweepDefinition, load_definition, parse_definition

PACKAGE = Path(job.__file__).parent
CARD = load_definition(PACKAGE / "sweep/sweep.yaml")
WIDE = load_definition(PACKAGE / "sweep/sweep-wide.yaml")
NOTHING = Overview("s", "/out", None, ())


def _settings(**given: Any) -> Settings:
    return Settings(dataset_uri="rows", output_uri="out", **given)


def _sweep(method: str = "bayes", **parameters: Any) -> SweepDefinition:
    metric = {"name": "eval/loss", "goal": "minimize"}
    return parse_definition({"method": method, "metric": metric, "parameters": parameters})


@pytest.mark.parametrize(
    ("definition", "is_told"),
    [
        (CARD, True),
        (WIDE, False),
        (_sweep(learning_rate={"values": [1e-5, 1e-4]}), True),
        (_sweep(learning_rate={"values": [1e-3, 1e-5]}), False),
        (_sweep(learning_rate={"value": 2e-4}), True),
        (_sweep(lora_r={"values": [8, 16]}), True),  # the setting's, 2e-4
    ],
)
def test_a_range_below_what_others_found_is_told(
    definition: SweepDefinition, is_told: bool
) -> None:
    lines = list(advice.of_range(_settings(), definition))
    assert len(lines) == is_told
    assert all("job/sweep/sweep-wide.yaml" in line for line in lines)


@pytest.mark.parametrize(
    ("definition", "fitting", "told"),
    [
        (CARD, {16, 32}, 32),
        (CARD, {16}, 16),
        (CARD, set(), None),
        (WIDE, {16, 32}, None),
        (_sweep(lora_r={"min": 4, "max": 16}), {16, 32}, 32),
    ],
)
def test_a_higher_rank_is_named_if_it_fits(
    definition: SweepDefinition, fitting: set[int], told: int | None
) -> None:
    lines = list(advice.of_rank(_settings(), definition, lambda rank: rank in fitting))
    assert [f"and {told} fits" in line for line in lines] == [True] * (told is not None)


def test_many_parameters_want_no_more_trials_than_few() -> None:
    (line,) = advice.of_trials(_settings(num_trials=20), WIDE)
    assert "6 parameters want about 8 trials, not 20" in line
    assert not list(advice.of_trials(_settings(num_trials=12), WIDE))
    assert not list(advice.of_trials(_settings(num_trials=20), CARD))
    drawn_by_wandb = _settings(num_trials=20, WANDB_SWEEP_ID="a/b/c")
    assert not list(advice.of_trials(drawn_by_wandb, WIDE))


@pytest.mark.parametrize(
    ("given", "definition", "says"),
    [
        ({}, CARD, "less than 0.001 nats of eval/loss twice running (JOB_MIN_GAIN; 0 switches"),
        ({"min_gain": 0}, CARD, "after 12 trials, whatever another one is expected to gain"),
        ({"num_trials": 5}, CARD, "after 5 trials"),
        ({}, _sweep("random", learning_rate={"values": [1e-5, 1e-4]}), "after 12 trials"),
        ({"WANDB_SWEEP_ID": "a/b/c"}, CARD, "W&B decides when its sweep ends"),
    ],
)
def test_a_new_sweep_says_when_it_will_end(
    given: dict[str, Any], definition: SweepDefinition, says: str
) -> None:
    words = describe_end(_settings(**given), definition, NOTHING, outlook_of(NOTHING))
    assert says in words
    assert ("twice running" in words) == ("twice running" in says)


@pytest.mark.parametrize(
    ("by_wandb", "says"), [(True, "W&B decides"), (False, "JOB_MIN_GAIN ends")]
)
def test_a_running_sweep_says_what_another_trial_brings_and_costs(
    by_wandb: bool, says: str
) -> None:
    outlook = Outlook(gain=0.0031, trial_gpu_seconds=7920, decided_by_wandb=by_wandb)
    words = describe_end(_settings(gpu_hourly_usd=0.35), CARD, NOTHING, outlook)
    assert "expected to gain 0.0031 nats for 2.2 GPU-hours ($0.77 at $0.35 an hour)" in words
    paid = describe_end(
        _settings(gpu_hourly_usd=0.35), CARD, NOTHING, replace(outlook, paid_usd=1.5)
    )
    assert "expected to gain 0.0031 nats for 2.2 GPU-hours ($1.50)" in paid
    assert says in words
