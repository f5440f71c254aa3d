"""When a trial will end, from its first steps' speed. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from job.ledger.records import Recipe
from job.training.state import TrainState

FORECAST_AFTER = 20  # optimizer steps of an attempt; the first few are slow, so they are left out
SLOW_STEPS = 5
# An evaluation's token costs one product a weight, a step's two, and more where it recomputes.
EVAL_SHARE_OF_A_STEP = 0.5


class StepTimer:
    """Counts an attempt's steps; says once, after `FORECAST_AFTER` of them, when they will end."""

    def __init__(self, recipe: Recipe, eval_tokens: int, budget_seconds: float | None) -> None:
        self._recipe = recipe
        self._eval_tokens = eval_tokens
        self._budget_seconds = budget_seconds
        self._num_steps = 0
        self._tokens = 0
        self._seconds = 0.0

    def count(self, state: TrainState, num_tokens: int, seconds: float) -> str | None:
        """Count a step that took `seconds`; the forecast, if it is time for it."""
        self._num_steps += 1
        if self._num_steps > SLOW_STEPS:
            self._tokens += num_tokens
            self._seconds += seconds
        if self._num_steps != FORECAST_AFTER:
            return None
        counted = FORECAST_AFTER - SLOW_STEPS
        return forecast(
            self._recipe,
            state,
            step_seconds=self._seconds / counted,
            step_tokens=self._tokens / counted,
            eval_tokens=self._eval_tokens,
            budget_seconds=self._budget_seconds,
            now=datetime.now(UTC),
        )


def forecast(
    recipe: Recipe,
    state: TrainState,
    *,
    step_seconds: float,
    step_tokens: float,
    eval_tokens: int,
    budget_seconds: float | None,
    now: datetime,
) -> str:
    """One line: speed, planned end, and whether the budget will cut the trial short.

    `step_seconds` and `step_tokens` are means over this attempt's steps; the time of an evaluation
    is what earlier ones took, or estimated from the tokens.
    """
    tokens_per_second = step_tokens / step_seconds
    measured = state.clock_seconds - state.step_seconds
    eval_seconds = (
        measured / len(state.curve)
        if state.curve
        else EVAL_SHARE_OF_A_STEP * eval_tokens / tokens_per_second
    )
    steps_left = recipe.planned_steps - state.step
    evals_left = sum(step > state.step for step in recipe.eval_steps)
    left = steps_left * step_seconds + evals_left * eval_seconds
    text = (
        f"{1 / step_seconds:.3g} steps/s, {tokens_per_second:.0f} tokens/s: the {steps_left} steps"
        f" and {evals_left} evaluations left end in {_hours(left)},"
        f" at {now + timedelta(seconds=left):%H:%M} UTC"
    )
    if budget_seconds is None:
        return text
    in_all = state.clock_seconds + left
    if in_all <= budget_seconds:
        return (
            f"{text}; {_hours(in_all)} of JOB_TRIAL_BUDGET_HOURS={budget_seconds / 3600:g} in all"
        )
    # Evaluations fall at equal shares of the steps, so seconds pass evenly.
    reached = state.step + int(steps_left * max(0.0, budget_seconds - state.clock_seconds) / left)
    return (
        f"{text}; JOB_TRIAL_BUDGET_HOURS={budget_seconds / 3600:g} will cut it short at about step"
        f" {reached} of {recipe.planned_steps}"
    )


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
    )
