"""The forecast of when a trial will end, from the speed of its first steps. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from job.ledger.records import Recipe
from job.training.state import TrainState

FORECAST_AFTER = 20  # optimizer steps of an attempt
SLOW_STEPS = 5  # the first steps of an attempt, which are slow and therefore not counted
# A token costs one product with each weight in an evaluation, and two (or three, where layers are
# recomputed) in a step.
EVAL_SHARE_OF_A_STEP = 0.5


class StepTimer:
    """Times an attempt's steps and, once `FORECAST_AFTER` are done, forecasts the trial's end."""

    def __init__(self, recipe: Recipe, eval_tokens: int, budget_seconds: float | None) -> None:
        self._recipe = recipe
        self._eval_tokens = eval_tokens
        self._budget_seconds = budget_seconds
        self._num_steps = 0
        self._tokens = 0
        self._seconds = 0.0

    def count(self, state: TrainState, num_tokens: int, seconds: float) -> str | None:
        """Count a step; return the forecast if this is the step to make it after, else None."""
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
    """Say in a line how fast the trial is, when it will end, and whether its budget is enough.

    `step_seconds` and `step_tokens` are means over this attempt's steps. An evaluation is taken to
    last as long as those before it, or, if there was none, as its `eval_tokens` suggest.
    """
    tokens_per_second = step_tokens / step_seconds
    eval_seconds = EVAL_SHARE_OF_A_STEP * eval_tokens / tokens_per_second
    if state.curve:
        eval_seconds = (state.clock_seconds - state.step_seconds) / len(state.curve)
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
    in_all, budget = state.clock_seconds + left, f"JOB_TRIAL_BUDGET_HOURS={budget_seconds / 3600:g}"
    if in_all <= budget_seconds:
        return f"{text}; {_hours(in_all)} of {budget} in all"
    # Evaluations are spread evenly over the steps, so steps and seconds are in proportion.
    reached = state.step + int(steps_left * max(0.0, budget_seconds - state.clock_seconds) / left)
    return f"{text}; {budget} will cut it short at about step {reached} of {recipe.planned_steps}"


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
    )
