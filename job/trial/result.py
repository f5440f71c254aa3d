"""How a trial went: its clock and budgets, and its result in numbers and in a line."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from job.ledger.accounts import wasted_gpu_seconds
from job.ledger.lease import Lease
from job.progress import size
from job.settings import Settings
from job.store.documents import Json
from job.training.state import TrainState

if TYPE_CHECKING:
    from job.training.fit import Fit


class AttemptClock:
    """GPU-seconds of this attempt, which every renewal of the lease tells, and the budgets."""

    def __init__(
        self, settings: Settings, lease: Lease, *, prepare_seconds: float, load_seconds: float
    ) -> None:
        self.prepare_seconds = prepare_seconds
        self.load_seconds = load_seconds
        self._lease = lease
        # The card waits while its model is loaded: that is paid for, too.
        self._started = time.monotonic() - load_seconds
        self._ended: float | None = None
        self._budget_seconds = settings.trial_budget_hours * 3600
        lease.measure = self._measure
        lease.report(patience_seconds=2 * settings.checkpoint_minutes * 60)

    def gpu_seconds(self) -> float:
        """Of all attempts at the slot, this one included."""
        return float(self._lease.content["gpu_seconds_before"]) + self._own_seconds()

    def out_of_time(self, state: TrainState) -> str | None:
        """Why the trial has to be cut short; None if it has time."""
        if state.clock_seconds >= self._budget_seconds:
            return "JOB_TRIAL_BUDGET_HOURS is spent"
        before = float(self._lease.content.get("seconds_before", 0.0))
        if before + self._own_seconds() >= 2 * self._budget_seconds:
            return "overrun: all attempts together took twice JOB_TRIAL_BUDGET_HOURS"
        return None

    def close(self, state: TrainState) -> tuple[float, float]:
        """End the attempt's account; GPU-seconds of all attempts, and of them the wasted ones.

        Wasted is what was not load, steps and evaluations that count: redone steps, restarts,
        waiting. The result and the accounts of the attempts then say the same.
        """
        self._ended = time.monotonic()
        lease = self._lease.content
        trained = state.clock_seconds - lease["attempt"]["clock_before"]
        useful = round(trained + self.load_seconds, 1)
        self._lease.report(useful_seconds=useful)
        own = {**lease, "attempt": lease["attempt"] | self._measure() | {"useful_seconds": useful}}
        wasted = lease["wasted_gpu_seconds_before"] + wasted_gpu_seconds(own)
        return round(self.gpu_seconds(), 1), round(wasted, 1)

    def _measure(self) -> Json:
        return {"gpu_seconds": self._own_seconds()}

    def _own_seconds(self) -> float:
        return round((self._ended or time.monotonic()) - self._started, 1)


def outcome(fitted: Fit, clock: AttemptClock) -> Json:
    """What training came to, for result.json."""
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
        "phase_seconds": {
            "prepare": round(clock.prepare_seconds, 2),
            "load": round(clock.load_seconds, 2),
            "train": round(state.step_seconds, 2),
            "evaluate": round(state.clock_seconds - state.step_seconds, 2),
        },
    }


def summary(result: Json) -> str:
    """How a trial ended, in a line."""
    if result["eval_loss"] is None:
        return f"{result['status']} ({result['reason']})"
    return (
        f"{result['status']} ({result['reason']}),"
        f" eval/loss {result['eval_loss']:.4f} at step {result['best_step']},"
        f" adapter {size(result['adapter_bytes'])}"
    )
