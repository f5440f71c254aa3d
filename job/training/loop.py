"""The training loop: evaluate when it is due, decide whether to end, take a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from job.data.samples import SampleTable
from job.errors import GpuError
from job.ledger.records import Recipe
from job.log import log
from job.training.state import StepReport, TrainState
from job.training.trainer import ShouldStop, Trainer

Status = Literal["completed", "truncated", "stopped", "diverged", "infeasible"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainOutcome:
    """How training ended; the state says where the best adapter, the trial's, was published."""

    status: Status
    reason: str
    state: TrainState


def train(
    trainer: Trainer,
    train_table: SampleTable,
    eval_table: SampleTable,
    *,
    state: TrainState,
    measure_step_0: bool,
    out_of_time: Callable[[TrainState], str | None],
    stop_early: Callable[[TrainState], str | None],
    on_step: Callable[[StepReport], None],
    on_eval: Callable[[int, float, bool], None],
    on_best: Callable[[], dict[str, Any]],
    should_stop: ShouldStop,
    stop_asked: Callable[[], str | None] = lambda: None,
) -> TrainOutcome:
    """Train to the planned end, to the end of patience, of the budget, or to divergence.

    `on_step` and `on_eval` (step, eval/loss, is it the best so far) report; `on_best` publishes the
    model's adapter and returns where; `should_stop` raises to end the trial between micro-batches;
    `out_of_time` says why the trial has to be cut short, `stop_asked` that a person ends it,
    `stop_early` why it is not worth going on (asked after an evaluation), or None. What comes next
    is read off `state` alone, so it goes on exactly where a saved state stopped.
    """
    recipe = trainer.recipe
    try:
        while True:
            cut_short = out_of_time(state) if state.step > 0 else None
            stopped = stop_asked() if state.step > 0 else None
            planned = state.step in recipe.eval_steps or (measure_step_0 and state.step == 0)
            measured = bool(state.curve) and state.curve[-1][0] == state.step
            if (planned or cut_short or stopped) and not measured:
                loss = easing_on_oom(
                    trainer, lambda: trainer.evaluate(eval_table, state, should_stop)
                )
                is_best = _judge(loss, state)
                on_eval(state.step, loss, is_best)
                if is_best:
                    state.best = on_best()
            hopeless = stopped or (stop_early(state) if planned else None)
            ending = _ending(recipe, state, cut_short=cut_short, hopeless=hopeless)
            if ending is not None:
                return TrainOutcome(*ending, state)
            should_stop()
            on_step(easing_on_oom(trainer, lambda: trainer.step(train_table, state, should_stop)))
            if state.diverged:
                return TrainOutcome("diverged", f"loss or gradients at step {state.step}", state)
    except torch.OutOfMemoryError as error:
        if state.step > 0:
            raise GpuError(
                f"out of GPU memory at step {state.step}, where the steps before had room: another"
                " process uses this card, or it is a smaller one"
            ) from error
        return TrainOutcome("infeasible", "one sample alone does not fit the GPU's memory", state)


def _judge(loss: float, state: TrainState) -> bool:
    """Enter an eval/loss into the curve; say whether it is the best after a step."""
    state.curve.append((state.step, loss))
    if not math.isfinite(loss):
        state.diverged = True
    if state.step == 0 or state.diverged:
        return False  # step 0 is the untuned model: nothing to keep, nothing to lose patience over
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.evals_without_improvement = 0
        return True
    state.evals_without_improvement += 1
    return False


def _ending(
    recipe: Recipe, state: TrainState, *, cut_short: str | None, hopeless: str | None
) -> tuple[Status, str] | None:
    """Status and reason, if training ends here."""
    if state.diverged:
        return "diverged", f"eval/loss at step {state.step}"
    if state.step >= recipe.planned_steps:
        return "completed", f"all {recipe.planned_steps} planned steps"
    if state.evals_without_improvement >= recipe.patience:
        return "completed", f"no better eval/loss in {recipe.patience} evaluations"
    if hopeless:
        return "stopped", hopeless
    if cut_short:
        return "truncated", cut_short
    return None


def easing_on_oom(trainer: Trainer, action: Callable[[], Result]) -> Result:
    """Run `action`; out of GPU memory, take the next smaller plan and run it again from its start.

    Raises `torch.OutOfMemoryError` if there is none.
    """
    while True:
        try:
            return action()
        except torch.OutOfMemoryError as error:
            failure = str(error).partition("\n")[0]
        # Outside the handler: the exception's traceback keeps the failed step's tensors alive.
        if not trainer.ease():
            raise torch.OutOfMemoryError(failure)
        log.warning(
            "out of GPU memory: from now on %d tokens a micro-batch, recomputing %s layers",
            trainer.token_budget,
            trainer.recompute,
        )
