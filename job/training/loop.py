"""The training loop: evaluate where the recipe says so, end if there is a reason, take a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from job.data.samples import SampleTable, Tables
from job.errors import GpuError, SettingsError
from job.ledger.records import Recipe, Status
from job.log import log
from job.training.device import allow_other_kernels
from job.training.recorder import Recorder
from job.training.state import TrainState
from job.training.trainer import ShouldStop, Trainer, never_stop

T = TypeVar("T")


@dataclass(frozen=True)
class TrainOutcome:
    """How training ended; `state` says where the best adapter, the trial's result, is kept."""

    status: Status
    reason: str
    state: TrainState


@dataclass(frozen=True)
class Ending:
    """What can end a trial before its planned end; a function that returns None lets it go on."""

    should_stop: ShouldStop = never_stop  # raises to end the trial between two micro-batches
    out_of_time: Callable[[TrainState], str | None] = lambda _: None  # asked before every step
    stop_asked: Callable[[], str | None] = lambda: None  # by a person; asked before every step
    hopeless: Callable[[TrainState], str | None] = lambda _: None  # asked after an evaluation


def train(trainer: Trainer, tables: Tables, recorder: Recorder, ending: Ending) -> TrainOutcome:
    """Train to the planned end, to the end of patience, to a reason of `ending`, or to divergence.

    What comes next is read off `recorder.state` alone, so a resumed trial goes on exactly where its
    saved state stopped. A trial that is cut short has taken a step and is evaluated once more.
    Raises what `ending.should_stop` raises, `GpuError` where a card that had room has none, and
    `SettingsError` for a base whose loss, untuned, is no number.
    """
    recipe, state, should_stop = trainer.recipe, recorder.state, ending.should_stop
    try:
        while True:
            cut_short = ending.out_of_time(state) if state.step > 0 else None
            stopped = ending.stop_asked() if state.step > 0 else None
            planned = state.step in recipe.eval_steps
            if planned or cut_short or stopped:
                _evaluate(trainer, tables.eval, recorder, should_stop)
            if planned and not stopped:
                stopped = ending.hopeless(state)
            if (end := _end(recipe, state, cut_short=cut_short, stopped=stopped)) is not None:
                return TrainOutcome(*end, state)
            should_stop()
            recorder.on_step(
                easing_on_oom(trainer, lambda: trainer.step(tables.train, state, should_stop))
            )
            if state.diverged:
                return TrainOutcome("diverged", f"loss or gradients at step {state.step}", state)
    except torch.OutOfMemoryError as error:
        if state.step > 0:
            raise GpuError(
                f"out of GPU memory at step {state.step}, where the steps before had room: another"
                " process uses this card, or it is a smaller one"
            ) from error
        return TrainOutcome("infeasible", "one sample alone does not fit the GPU's memory", state)


def _evaluate(
    trainer: Trainer, table: SampleTable, recorder: Recorder, should_stop: ShouldStop
) -> None:
    """Evaluate the adapter as it is and publish it if it is the best; at most once a step."""
    state = recorder.state
    if state.curve and state.curve[-1][0] == state.step:
        return
    measured = easing_on_oom(trainer, lambda: trainer.evaluate_rows(table, state, should_stop))
    if state.step == 0 and not math.isfinite(measured.loss):
        raise SettingsError(
            f"JOB_BASE_MODEL: the untuned model's eval/loss is {measured.loss}: it overflows in"
            f" {trainer.dtype}, which every trial of this sweep would; take another base"
        )
    is_best = _judge(measured.loss, state)
    recorder.on_eval(state.step, measured.loss, is_best)
    if is_best:
        state.best = recorder.on_best(measured)


def _judge(loss: float, state: TrainState) -> bool:
    """Enter an eval/loss into the curve; True if it is the lowest of those after a step."""
    state.curve.append((state.step, loss))
    if not math.isfinite(loss):
        state.diverged = True
    if state.step == 0 or state.diverged:
        return False  # step 0 is the untuned model: no adapter to keep, no step that did not help
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.evals_without_improvement = 0
        return True
    state.evals_without_improvement += 1
    return False


def _end(
    recipe: Recipe, state: TrainState, *, cut_short: str | None, stopped: str | None
) -> tuple[Status, str] | None:
    """Decide whether training ends at this step: the status and the reason, or None."""
    if state.diverged:
        return "diverged", f"eval/loss at step {state.step}"
    if state.step >= recipe.planned_steps:
        return "completed", f"all {recipe.planned_steps} planned steps"
    if state.evals_without_improvement >= recipe.patience:
        return "completed", f"no better eval/loss in {recipe.patience} evaluations"
    if stopped:
        return "stopped", stopped
    if cut_short:
        return "truncated", cut_short
    return None


def with_other_kernels(action: Callable[[], T]) -> T:
    """Run `action`, and again with any kernels where an operation has no deterministic one."""
    while True:
        try:
            return action()
        except RuntimeError as error:
            if not allow_other_kernels(error):
                raise


def easing_on_oom(trainer: Trainer, action: Callable[[], T]) -> T:
    """Run `action`; whenever it runs out of GPU memory, ease the trainer's plan and run it again.

    Raises `torch.OutOfMemoryError` if the plan cannot be eased any further.
    """
    while True:
        try:
            return with_other_kernels(action)
        except torch.OutOfMemoryError as error:
            failure = str(error).partition("\n")[0]
        # Outside the handler: inside it the traceback keeps the failed step's tensors alive.
        if not trainer.ease():
            raise torch.OutOfMemoryError(failure)
        log.warning(
            "out of GPU memory: from now on %d tokens a micro-batch, recomputing %s layers",
            trainer.token_budget,
            trainer.recompute,
        )
