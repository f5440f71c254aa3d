"""Training without torch, for tests of everything around it: deterministic, fast, resumable.

Fakes the contract of `job.training.fit.fit`: what a step computes is a function of the state and
the step, state is constant between steps, a stop keeps the last step, the best adapter is published
when it becomes best. It computes a chain of hashes; its losses fall and sometimes rise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from job.errors import PreemptedError
from job.training.state import ROWS_FILE, TrainState, read_state, write_state
from job.trial.attempt import Training
from tests.ledger.documents import make_rows

STEP_SECONDS = 0.004


class FakeFit:
    """The return value of `fit`, as far as the trial reads it."""

    def __init__(self, state: TrainState, history_path: Path) -> None:
        self.status, self.reason = "completed", "all planned steps"
        self.state, self.history_path = state, history_path
        self.peak_memory_bytes = None
        rows = history_path.with_name(ROWS_FILE)
        self.rows_path = rows if rows.exists() else None


def _fit(attempt: Any, keeper: Any, work_dir: Path) -> Any:
    """Run `recipe.planned_steps` steps of hashing."""
    recipe = attempt.spec.recipe
    state, value = TrainState(), f"{recipe.learning_rate}"
    history = work_dir / "history.jsonl"
    history.touch()
    if keeper.resume_dir is not None:
        state, saved = read_state(keeper.resume_dir)
        value = saved["value"]
        shutil.copyfile(keeper.resume_dir / "history.jsonl", history)
        if state.best:
            shutil.copyfile(keeper.resume_dir / ROWS_FILE, work_dir / ROWS_FILE)
    keeper.report(first_step=state.step, step=state.step)
    saved_step = state.step

    def checkpoint() -> None:
        nonlocal saved_step
        if saved_step == state.step:
            return
        folder = work_dir / f"checkpoint-{state.step}"
        folder.mkdir()
        write_state(folder, state, {"value": value})
        shutil.copyfile(history, folder / "history.jsonl")
        if state.best:
            shutil.copyfile(work_dir / ROWS_FILE, folder / ROWS_FILE)
        keeper.put_checkpoint(folder, state.step, state.best["key"] if state.best else None)
        saved_step = state.step

    stopped: str | None = None
    try:
        while state.step < recipe.planned_steps and not stopped:
            attempt.should_stop()
            time.sleep(STEP_SECONDS)  # a step takes time, or nothing could fall into one
            _count_step()
            value = hashlib.sha256(f"{value}{state.step}".encode()).hexdigest()
            state.step += 1
            keeper.report(step=state.step)
            stopped = attempt.stop_asked()  # once a step: whoever ends here has been evaluated
            if state.step in recipe.eval_steps or stopped:
                _evaluate(state, value, work_dir, keeper)
            _write_line(history, state, value)
            if keeper.is_due():
                checkpoint()
    except PreemptedError:
        checkpoint()
        raise
    fitted = FakeFit(state, history)
    if stopped and state.step < recipe.planned_steps:
        fitted.status, fitted.reason = "stopped", stopped
    return fitted


def _write_line(history: Path, state: TrainState, value: str) -> None:
    """Write a history line as `fit` does, with the step's evaluation in it."""
    entry = {"step": state.step, "value": value, "train/loss": 1 / state.step, "tokens": 10,
             "learning_rate": 1e-4, "seconds": STEP_SECONDS}  # fmt: skip
    if state.curve and state.curve[-1][0] == state.step:
        entry["eval/loss"] = state.curve[-1][1]
    with history.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _count_step() -> None:
    """Append a byte for every computed step, whatever becomes of it: benchmarks count them."""
    if path := os.environ.get("FAKE_TRAINING_LOG"):
        with Path(path).open("a") as file:
            file.write(".")


def _evaluate(state: TrainState, value: str, work_dir: Path, keeper: Any) -> None:
    loss = 1 + int(value[:4], 16) / 2**16 - state.step / 100
    state.curve.append((state.step, loss))
    if loss >= state.best_loss:
        return
    state.best_loss, state.best_step = loss, state.step
    rows = make_rows(loss, trial=value, step=state.step, num_rows=24)
    (work_dir / ROWS_FILE).write_text(json.dumps(rows.to_json()))
    folder = work_dir / f"best-{state.step}"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(value)
    kept = keeper.put_best(folder)
    state.best = {"key": kept.key, "sha256": kept.sha256, "bytes": kept.size_bytes}


def _nothing(*_: Any) -> Any:
    """Open no device, load no base."""


FAKE_TRAINING = Training(open_device=_nothing, load_base=_nothing, fit=_fit)
