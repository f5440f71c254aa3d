"""How a trial went: its clock and budgets, why it ends early, its result in numbers and words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from job.ledger.accounts import wasted_gpu_seconds
from job.ledger.lease import HeldLease
from job.ledger.ledger import Ledger
from job.ledger.records import Result
from job.progress import size
from job.settings import Settings
from job.sweep.definition import SweepDefinition
from job.sweep.hyperband import is_hopeless
from job.training.state import TrainState

if TYPE_CHECKING:
    from job.training.fit import Fit


class AttemptClock:
    """The budgets of a trial, and the cost of all attempts at it."""

    def __init__(
        self, settings: Settings, lease: HeldLease, *, prepare_seconds: float, load_seconds: float
    ) -> None:
        self.prepare_seconds = prepare_seconds
        self.load_seconds = load_seconds
        self.untuned_seconds = 0.0  # of measuring the untuned base in 16 bits
        self._lease = lease
        self._budget_seconds = settings.trial_budget_hours * 3600

    def gpu_seconds(self) -> float:
        """GPU-seconds of all attempts at the slot, this one included."""
        return self._lease.record.gpu_seconds_before + self._lease.own_gpu_seconds

    def out_of_time(self, state: TrainState) -> str | None:
        """Why the trial has to be cut short; None if it has time."""
        if state.clock_seconds >= self._budget_seconds:
            return "JOB_TRIAL_BUDGET_HOURS is spent"
        seconds = self._lease.record.seconds_before + self._lease.own_gpu_seconds
        if seconds >= 2 * self._budget_seconds:
            return "overrun: all attempts together took twice JOB_TRIAL_BUDGET_HOURS"
        return None

    def close(self, state: TrainState) -> tuple[float, float]:
        """End the attempt's account; return the GPU-seconds of all attempts, and the wasted ones.

        Wasted is all but preparing, loading and measuring the base once, and the steps and
        evaluations that count: redone steps, restarts, waiting. The result and the accounts of the
        attempts then say the same.
        """
        self._lease.stop_paying()
        lease = self._lease.record
        trained = state.clock_seconds - lease.attempt.clock_before
        loaded = self.prepare_seconds + self.load_seconds
        useful = round(trained + loaded + self.untuned_seconds, 1)
        self._lease.report(useful_seconds=useful)
        own = {"gpu_seconds": self._lease.own_gpu_seconds, "useful_seconds": useful}
        closed = lease.changed(attempt=lease.attempt.changed(**own))
        wasted = lease.wasted_gpu_seconds_before + wasted_gpu_seconds(closed)
        return round(self.gpu_seconds(), 1), round(wasted, 1)


def stop_early(
    definition: SweepDefinition, ledger: Ledger, settings: Settings, state: TrainState
) -> str | None:
    """Why the sweep file's `early_terminate` ends this trial; None if it may go on."""
    if definition.early_terminate is None or settings.wandb_sweep_id is not None:
        return None  # W&B tells its agent when its own early_terminate ends a run
    own = [loss for step, loss in state.curve if step > 0]
    others = [
        [loss for step, loss in result.finite_curve if step > 0]
        for _, _, result in ledger.committed(settings.num_trials)
    ]
    if is_hopeless(definition.early_terminate, own, others):
        return f"early_terminate: among the worse after {len(own)} evaluations"
    return None


def training_result(fitted: Fit, clock: AttemptClock) -> dict[str, Any]:
    """The part of a `Result` that the training alone decides; ends the attempt's account."""
    state = fitted.state
    best: dict[str, Any] = state.best or {}
    gpu_seconds, wasted = clock.close(state)
    return {
        "status": fitted.status,
        "reason": fitted.reason,
        "eval_loss": state.best_loss if best else None,
        "best_step": state.best_step,
        "steps": state.step,
        "adapter_key": best.get("key"),
        "adapter_sha256": best.get("sha256"),
        "adapter_bytes": best.get("bytes"),
        "gpu_seconds": gpu_seconds,
        "wasted_gpu_seconds": wasted,
        "training_seconds": round(state.clock_seconds, 1),
        "tokens_per_second": round(state.tokens / state.step_seconds, 1) if state.tokens else None,
        "peak_memory_bytes": fitted.peak_memory_bytes,
        # JSON has no NaN: a diverged evaluation stands as null.
        "curve": [[step, loss if math.isfinite(loss) else None] for step, loss in state.curve],
        "untuned_16bit": state.untuned_16bit,
        "phase_seconds": {
            "prepare": round(clock.prepare_seconds, 2),
            "load": round(clock.load_seconds, 2),
            **({"untuned_16bit": round(untuned, 2)} if (untuned := clock.untuned_seconds) else {}),
            "train": round(state.step_seconds, 2),
            "evaluate": round(state.clock_seconds - state.step_seconds, 2),
        },
    }


def summary(result: Result) -> str:
    """How a trial ended, in a line."""
    if result.eval_loss is None:
        return f"{result.status} ({result.reason})"
    return (
        f"{result.status} ({result.reason}),"
        f" eval/loss {result.eval_loss:.4f} at step {result.best_step},"
        f" adapter {size(result.adapter_bytes or 0)}"
    )
