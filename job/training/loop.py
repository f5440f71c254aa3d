"""The training loop: micro-batches, backward, unscale, clip, step, schedule, evaluate."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch.nn.utils import clip_grad_norm_

from job.data.samples import SampleTable
from job.log import log
from job.training.batching import MicroBatch, pack, samples_of_step
from job.training.loss import target_nll
from job.training.model import adapter_state, compute_dtype, trainable_parameters
from job.training.recipe import Recipe, derive_seed, learning_rate_at

MAX_SKIPPED_STEPS = 20  # in a row; the scaler's first few skips are normal
MIN_TOKEN_BUDGET = 16  # below it every sample goes alone, and a smaller budget changes nothing

Status = Literal["completed", "truncated", "diverged", "infeasible"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int  # steps done, this one included
    train_loss: float  # mean over the step's target tokens, natural log
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int
    seconds: float


@dataclass
class TrainState:
    """All that has to survive from one optimizer step to the next, beside adapter and optimizer."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None
    best_loss: float = math.inf
    best_adapter: dict[str, torch.Tensor] | None = None
    evals_without_improvement: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, eval_loss)
    clock_seconds: float = 0.0  # training clock: steps and evaluations, nothing else
    skipped_in_a_row: int = 0
    tokens: int = 0
    diverged: bool = False


@dataclass(frozen=True)
class TrainOutcome:
    """How training ended; the state's best adapter is the trial's adapter."""

    status: Status
    reason: str
    state: TrainState


class Trainer:
    """A model being trained by a recipe on one device."""

    def __init__(
        self, model: Any, recipe: Recipe, *, device: torch.device, token_budget: int
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.device = device
        self.token_budget = token_budget
        self.parameters = list(trainable_parameters(model).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.999), weight_decay=recipe.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def step(self, table: SampleTable, state: TrainState) -> StepReport:
        """One optimizer step on the samples of `state.step`. Raises `torch.OutOfMemoryError`."""
        started = time.monotonic()
        # Dropout must not depend on what ran before, or a resumed trial would differ.
        torch.manual_seed(derive_seed(self.recipe.seed, "step", state.step))
        learning_rate = learning_rate_at(self.recipe, state.step)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        indices = samples_of_step(self.recipe, len(table), state.step)
        batches = list(pack(table, indices, self.token_budget))
        num_targets = sum(len(batch.targets) for batch in batches)
        # Summed on the device: reading a loss back after every micro-batch would stall the GPU.
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in batches:
            nll = self._nll(batch)
            self.scaler.scale(nll / num_targets).backward()  # type: ignore[no-untyped-call]
            total += nll.detach()
        self.scaler.unscale_(self.optimizer)
        grad_norm = float(clip_grad_norm_(self.parameters, self.recipe.max_grad_norm))
        self._update(grad_norm, state)
        train_loss = float(total) / num_targets
        state.step += 1
        state.diverged = not math.isfinite(train_loss) or state.skipped_in_a_row > MAX_SKIPPED_STEPS
        seconds = time.monotonic() - started
        num_tokens = sum(batch.num_tokens for batch in batches)
        state.tokens += num_tokens
        state.clock_seconds += seconds
        return StepReport(state.step, train_loss, learning_rate, grad_norm, num_tokens, seconds)

    def evaluate(
        self, table: SampleTable, state: TrainState, should_stop: Callable[[], None]
    ) -> float:
        """eval/loss: summed NLL over all target tokens divided by their number, fp32 sums."""
        started = time.monotonic()
        self.model.eval()
        total = 0.0
        with torch.no_grad():
            for batch in pack(table, range(len(table)), self.token_budget):
                should_stop()
                total += float(self._nll(batch))
        state.clock_seconds += time.monotonic() - started
        return total / table.num_target_tokens

    def _nll(self, batch: MicroBatch) -> torch.Tensor:
        # Entered here, around backbone and head alike; an autocast around an outer forward only
        # would not cover a backbone that is called directly.
        with self._autocast():
            return target_nll(self.model, batch.to(self.device))

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=compute_dtype(self.device))

    def _update(self, grad_norm: float, state: TrainState) -> None:
        """Step the optimizer, unless a gradient overflowed: then the scaler skips and shrinks."""
        skipped = not math.isfinite(grad_norm)
        if not skipped or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0


def train(
    trainer: Trainer,
    train_table: SampleTable,
    eval_table: SampleTable,
    *,
    state: TrainState,
    measure_step_0: bool,
    budget_seconds: float,
    on_step: Callable[[StepReport], None],
    on_eval: Callable[[int, float, bool], None],
    should_stop: Callable[[], None],
) -> TrainOutcome:
    """Train to the planned end, to the end of patience, of the budget, or to divergence.

    `on_step` and `on_eval` (step, eval/loss, is it the best so far) report; `should_stop` raises
    to end the trial between micro-batches. `budget_seconds` is compared with the training clock.
    What comes next is read off `state` alone, so it goes on exactly where a saved state stopped.
    """
    recipe = trainer.recipe
    try:
        while True:
            out_of_time = state.clock_seconds >= budget_seconds
            planned = state.step in recipe.eval_steps or (measure_step_0 and state.step == 0)
            measured = bool(state.curve) and state.curve[-1][0] == state.step
            if (planned or (out_of_time and state.step > 0)) and not measured:
                loss = _halving_on_oom(
                    trainer, lambda: trainer.evaluate(eval_table, state, should_stop)
                )
                is_best = _judge(loss, state, trainer.model)
                on_eval(state.step, loss, is_best)
            ending = _ending(recipe, state, out_of_time=out_of_time)
            if ending is not None:
                return TrainOutcome(*ending, state)
            should_stop()
            on_step(_halving_on_oom(trainer, lambda: trainer.step(train_table, state)))
            if state.diverged:
                return TrainOutcome("diverged", f"loss or gradients at step {state.step}", state)
    except torch.OutOfMemoryError:
        return TrainOutcome("infeasible", "one sample alone does not fit the GPU's memory", state)


def _judge(loss: float, state: TrainState, model: Any) -> bool:
    """Enter an eval/loss into the curve; keep the adapter if it is the best after a step."""
    state.curve.append((state.step, loss))
    if not math.isfinite(loss):
        state.diverged = True
    if state.step == 0 or state.diverged:
        return False  # step 0 is the untuned model: nothing to keep, nothing to lose patience over
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.best_adapter = adapter_state(model)
        state.evals_without_improvement = 0
        return True
    state.evals_without_improvement += 1
    return False


def _ending(recipe: Recipe, state: TrainState, *, out_of_time: bool) -> tuple[Status, str] | None:
    """Status and reason, if training ends here."""
    if state.diverged:
        return "diverged", f"eval/loss at step {state.step}"
    if state.step >= recipe.planned_steps:
        return "completed", f"all {recipe.planned_steps} planned steps"
    if state.evals_without_improvement >= recipe.patience:
        return "completed", f"no better eval/loss in {recipe.patience} evaluations"
    if out_of_time and state.step > 0:
        return "truncated", "JOB_TRIAL_BUDGET_HOURS is spent"
    return None


def _halving_on_oom(trainer: Trainer, action: Callable[[], Result]) -> Result:
    """Run `action`; out of GPU memory, halve the token budget and run it again from its start."""
    while True:
        try:
            return action()
        except torch.OutOfMemoryError:
            if trainer.token_budget < MIN_TOKEN_BUDGET:
                raise
        # Outside the handler: the exception's traceback keeps the failed step's tensors alive.
        trainer.token_budget //= 2
        log.warning("out of GPU memory: token budget halved to %d", trainer.token_budget)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
