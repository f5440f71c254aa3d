"""The planned end as the log says it after 20 steps. `pytest tests/training/test_eta.py`"""

from __future__ import annotations

from datetime import UTC, datetime

from job.training.eta import StepTimer, forecast
from job.training.state import TrainState
from tests.tiny_model import make_recipe

NOW = datetime(2026, 1, 5, 22, 30, tzinfo=UTC)


def _forecast(state: TrainState, budget_seconds: float | None) -> str:
    recipe = make_recipe(planned_steps=1500, eval_steps=(750, 1500))
    return forecast(
        recipe,
        state,
        step_seconds=4.0,
        step_tokens=1600.0,
        eval_tokens=40_000,
        budget_seconds=budget_seconds,
        now=NOW,
    )


def test_speed_and_end_with_evaluations_estimated_from_their_tokens() -> None:
    state = TrainState(step=20, clock_seconds=80, step_seconds=80)
    # 1480 x 4 s + 2 x 40000 / 400 / 2 s = 6020 s; 80 s are gone.
    assert _forecast(state, 10_800) == (
        "0.25 steps/s, 400 tokens/s: the 1480 steps and 2 evaluations left end in 1 h 40 min, at"
        " 00:10 UTC; 1 h 42 min of JOB_TRIAL_BUDGET_HOURS=3 in all"
    )


def test_measured_evaluations_count_as_they_were() -> None:
    state = TrainState(step=760, clock_seconds=3740, step_seconds=3040, curve=[(0, 2), (750, 1)])
    # 740 x 4 s + 1 x 350 s = 3310 s; 3740 s are gone.
    text = _forecast(state, None)
    assert text.endswith("the 740 steps and 1 evaluations left end in 55.2 min, at 23:25 UTC")


def test_a_budget_that_cuts_the_trial_short_is_named_with_the_step() -> None:
    state = TrainState(step=20, clock_seconds=80, step_seconds=80)
    # 3600 - 80 s of 6020 s reach 865 of the 1480 steps left.
    assert _forecast(state, 3600).endswith(
        "; JOB_TRIAL_BUDGET_HOURS=1 will cut it short at about step 885 of 1500"
    )
    spent = TrainState(step=20, clock_seconds=80, step_seconds=80)
    assert "at about step 20 of 1500" in _forecast(spent, 60)


def test_the_line_comes_once_after_twenty_steps_and_leaves_out_the_slow_ones() -> None:
    timer = StepTimer(make_recipe(planned_steps=100, eval_steps=(100,)), 1000, None)
    lines = [timer.count(TrainState(step=n + 1), 500, 9.0 if n < 5 else 0.5) for n in range(60)]
    assert [n for n, line in enumerate(lines) if line] == [19]
    assert str(lines[19]).startswith(
        "2 steps/s, 1000 tokens/s: the 80 steps and 1 evaluations left"
    )
