"""A 20-slot sweep with every state in it, made by the real trial code with a scripted training.

Fakes `job.training.fit.fit` only: no torch; the loss is a smooth function of the parameters, so
that charts show what they would show. `python -m tests.every_state FOLDER` keeps one to look at.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from job.errors import JobError, PreemptedError
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.ledger.records import Recipe
from job.ledger.redo import redo
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.local import LocalStore
from job.training.recipe import derive_seed
from job.training.state import ROWS_FILE, TrainState, read_state, write_state
from job.trial.attempt import Training
from job.trial.run import run_trial_on
from job.trial.slots import STARTLESS_ATTEMPTS
from tests.ledger.documents import make_rows
from tests.workers import make_inputs

NUM_SLOTS = 20
STATUSES = {3: "truncated", 5: "diverged", 7: "stopped", 9: "infeasible"}
PREEMPTED_ONCE = (2, 6, 11)
REDONE, EXCLUDED, RUNNING, WAITING, GIVEN_UP, DAMAGED, EMPTY = 4, 12, 14, 15, 16, 17, (18, 19)
SECONDS_A_STEP = 5.2

SWEEP = """\
name: s
method: bayes
metric: {name: eval/loss, goal: minimize}
parameters:
  learning_rate: {distribution: log_uniform_values, min: 5.0e-6, max: 2.0e-4}
  gradient_accumulation_steps: {values: [4, 8]}
  lora_dropout: {values: [0.05, 0.1]}
  weight_decay: {values: [0.01, 0.05]}
"""


class _ScriptedFit:
    def __init__(self, status: str, reason: str, state: TrainState, history: Path) -> None:
        self.status, self.reason = status, reason
        self.state, self.history_path = state, history
        self.peak_memory_bytes = 11_800_000_000
        rows = history.with_name(ROWS_FILE)
        self.rows_path = rows if rows.exists() else None


def _loss(recipe: Recipe, step: int) -> float:
    """A loss that falls with the steps, lowest near a learning rate of 1.4e-4."""
    away = math.log10(recipe.learning_rate / 1.4e-4)
    goal = 1.02 + 0.16 * away**2 + 0.02 * (recipe.gradient_accumulation_steps == 8)
    noise = 0.01 * (derive_seed(recipe.learning_rate, step) / 2**63 - 0.5)
    return goal + (1.9 - goal) * math.exp(-6 * step / recipe.planned_steps) + noise


def _fit(attempt: Any, keeper: Any, work_dir: Path) -> Any:
    slot, recipe = attempt.slot.number, attempt.spec.recipe
    history, state = work_dir / "history.jsonl", TrainState()
    history.touch()
    if keeper.resume_dir is not None:
        state, _ = read_state(keeper.resume_dir)
        shutil.copyfile(keeper.resume_dir / "history.jsonl", history)
        if state.best:
            shutil.copyfile(keeper.resume_dir / ROWS_FILE, work_dir / ROWS_FILE)
    keeper.report(first_step=state.step, step=state.step)
    status = STATUSES.get(slot, "completed")
    if status == "infeasible":
        reason = "one sample alone does not fit the GPU's memory"
        return _ScriptedFit(status, reason, state, history)
    if attempt.spec.measure_step_0 and not state.curve:
        state.curve.append((0, _loss(recipe, 0)))
    for step in recipe.eval_steps:
        if step <= state.step:
            continue
        attempt.lease._paid_since -= SECONDS_A_STEP * (step - state.step)  # claimed, not spent
        attempt.should_stop()
        _advance(state, recipe, step, history)
        if status == "diverged" and step > recipe.planned_steps / 2:
            state.curve[-1], state.diverged = (step, math.nan), True
            return _ScriptedFit(status, f"loss or gradients at step {step}", state, history)
        _keep_best(state, work_dir, keeper, trial=slot)
        keeper.report(step=step, eval_loss=state.curve[-1][1], tokens_per_second=365.0)
        halfway = step >= recipe.planned_steps / 2
        if halfway and slot in (WAITING, RUNNING):
            raise _leave(state, work_dir, keeper, history)
        if halfway and slot in PREEMPTED_ONCE and attempt.lease.epoch == 1:
            raise _leave(state, work_dir, keeper, history)
        if halfway and status in ("truncated", "stopped"):
            reasons = {"truncated": "JOB_TRIAL_BUDGET_HOURS is spent", "stopped": "early_terminate"}
            return _ScriptedFit(status, reasons[status], state, history)
    return _ScriptedFit(status, f"all {recipe.planned_steps} planned steps", state, history)


def _advance(state: TrainState, recipe: Recipe, step: int, history: Path) -> None:
    seconds = SECONDS_A_STEP * (step - state.step)
    with history.open("a") as file:
        for done in range(state.step + 1, step + 1):
            file.write(json.dumps({"step": done, "train/loss": _loss(recipe, done)}) + "\n")
    state.step, state.clock_seconds = step, state.clock_seconds + seconds
    state.step_seconds += seconds
    state.tokens += int(seconds * 365)
    state.curve.append((step, _loss(recipe, step)))


def _keep_best(state: TrainState, work_dir: Path, keeper: Any, *, trial: int) -> None:
    step, loss = state.curve[-1]
    if loss >= state.best_loss:
        return
    state.best_loss, state.best_step = loss, step
    rows = make_rows(loss, trial=trial, step=step)
    (work_dir / ROWS_FILE).write_text(json.dumps(rows.to_json()))
    folder = work_dir / f"best-{step}"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(f"{loss}")
    (folder / "adapter_config.json").write_text("{}")
    kept = keeper.put_best(folder)
    state.best = {"key": kept.key, "sha256": kept.sha256, "bytes": kept.size_bytes}


def _leave(state: TrainState, work_dir: Path, keeper: Any, history: Path) -> PreemptedError:
    folder = work_dir / f"checkpoint-{state.step}"
    folder.mkdir()
    write_state(folder, state, {})
    shutil.copyfile(history, folder / "history.jsonl")
    if state.best:
        shutil.copyfile(work_dir / ROWS_FILE, folder / ROWS_FILE)
    keeper.put_checkpoint(folder, state.step, state.best["key"] if state.best else None)
    return PreemptedError("told to end")


def _nothing(*_: Any) -> Any:
    """Open no device, load no base."""


def _never(reason: str) -> None:
    raise AssertionError(reason)  # the watchdog is not started


SCRIPTED = Training(open_device=_nothing, load_base=_nothing, fit=_fit)


def make_sweep(folder: Path) -> tuple[Ledger, dict[str, Any]]:
    """Run 18 of 20 slots in this process; return the ledger and the settings they ran with."""
    given = make_inputs(folder) | {"num_trials": NUM_SLOTS, "max_steps": 1500, "num_epochs": 1000}
    given |= {"evals_per_trial": 8, "lease_seconds": 120, "gpu_hourly_usd": 0.35}
    Path(given["sweep_file"]).write_text(SWEEP)
    store = LocalStore(folder / "out")
    ledger = Ledger(store, "s")
    for slot in range(NUM_SLOTS - len(EMPTY)):
        settings = Settings(**given, completion_index=slot)
        for _ in range(2):
            try:
                stop = Stop(15)
                run_trial_on(store, settings, stop, SCRIPTED, Watchdog(stop, _never))
            except JobError:
                if slot not in PREEMPTED_ONCE:
                    break
    redo(ledger.slot(REDONE))
    stop = Stop(15)
    settings = Settings(**given, completion_index=REDONE)
    run_trial_on(store, settings, stop, SCRIPTED, Watchdog(stop, _never))
    reason = f"{STARTLESS_ATTEMPTS} attempts in a row ended before their first step"
    return _spoil(ledger, folder, reason), given


def _spoil(ledger: Ledger, folder: Path, reason: str) -> Ledger:
    """Make slots that no sound run leaves: at work, excluded, given up, one without its spec."""
    lease = acquire(ledger, [RUNNING], lease_seconds=120, should_stop=lambda: None)
    assert lease is not None
    lease.report(step=800, eval_loss=1.09, tokens_per_second=362.0, gpu_seconds=4300.0)
    lease.renew()
    ledger.slot(EXCLUDED).exclude("its rows were wrong")
    slots = folder / "out/sweeps/s/slots"
    for path in (slots / f"{GIVEN_UP:04d}").glob("result.json*"):
        path.unlink()
    ledger.slot(GIVEN_UP).give_up(reason)
    for path in (slots / f"{DAMAGED:04d}").glob("spec.json*"):
        path.unlink()
    return ledger


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    make_sweep(Path(sys.argv[1]))
