"""One trial's training, from files on disk to an adapter folder on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from job.data.samples import SampleTable
from job.log import log
from job.progress import StepProgress
from job.training.device import peak_memory_bytes
from job.training.loop import StepReport, Trainer, TrainOutcome, TrainState, train
from job.training.memory import MemoryPlan
from job.training.model import add_adapters, load_base, save_adapter, trainable_parameters
from job.training.recipe import Recipe


@dataclass(frozen=True)
class FitInputs:
    """What a training run needs to know beside its recipe."""

    location: str  # of the base model, for from_pretrained()
    revision: str | None
    train_table: SampleTable
    eval_table: SampleTable
    memory: MemoryPlan
    budget_seconds: float
    measure_step_0: bool
    max_adapter_bytes: int


@dataclass(frozen=True)
class Fit:
    """What a training run leaves."""

    status: str  # completed, truncated, diverged or infeasible
    reason: str
    adapter_dir: Path | None  # None if no evaluation ever gave a best adapter
    history_path: Path  # a JSON line for every optimizer step and evaluation
    eval_loss: float | None  # of the adapter in adapter_dir
    best_step: int | None
    steps: int
    curve: list[tuple[int, float]]  # (step, eval/loss)
    training_seconds: float  # training clock
    tokens_per_second: float | None  # of optimizer steps: real tokens, none of them padding
    peak_memory_bytes: int | None
    phase_seconds: dict[str, float]  # load, train, evaluate


def fit(
    recipe: Recipe,
    inputs: FitInputs,
    *,
    device: torch.device,
    work_dir: Path,
    should_stop: Callable[[], None],
) -> Fit:
    """Load the base, train, and save the best adapter under `work_dir`.

    Raises `SettingsError` if the base cannot be loaded, and whatever `should_stop` raises.
    """
    started = time.monotonic()
    base = load_base(inputs.location, inputs.revision, device)
    should_stop()
    model = add_adapters(base, recipe, recompute=inputs.memory.recompute)
    num_parameters = sum(p.numel() for p in trainable_parameters(model).values())
    load_seconds = time.monotonic() - started
    log.info(
        "model: %s in %.1f s, %.2f M adapter parameters",
        model.config.model_type,
        load_seconds,
        num_parameters / 1e6,
    )
    history = _History(work_dir / "history.jsonl", recipe)
    if 2 * num_parameters > inputs.max_adapter_bytes:
        reason = (
            f"adapter would be {2 * num_parameters / 1e6:.0f} MB, limit is"
            f" {inputs.max_adapter_bytes / 1e6:.0f} MB: lower lora_r or raise JOB_MAX_ADAPTER_MB"
        )
        outcome = TrainOutcome("infeasible", reason, TrainState())
    else:
        trainer = Trainer(model, recipe, device=device, token_budget=inputs.memory.token_budget)
        with StepProgress("training", recipe.planned_steps) as history.progress, history:
            outcome = train(
                trainer,
                inputs.train_table,
                inputs.eval_table,
                state=TrainState(),
                measure_step_0=inputs.measure_step_0,
                budget_seconds=inputs.budget_seconds,
                on_step=history.on_step,
                on_eval=history.on_eval,
                should_stop=should_stop,
            )
    state = outcome.state
    adapter_dir = None
    if state.best_adapter is not None:
        adapter_dir = work_dir / "adapter"
        save_adapter(model, state.best_adapter, adapter_dir)
    return Fit(
        status=outcome.status,
        reason=outcome.reason,
        adapter_dir=adapter_dir,
        history_path=history.path,
        eval_loss=None if state.best_step is None else state.best_loss,
        best_step=state.best_step,
        steps=state.step,
        curve=state.curve,
        training_seconds=state.clock_seconds,
        tokens_per_second=state.tokens / history.step_seconds if history.step_seconds else None,
        peak_memory_bytes=peak_memory_bytes(device),
        phase_seconds={
            "load": load_seconds,
            "train": history.step_seconds,
            "evaluate": state.clock_seconds - history.step_seconds,
        },
    )


class _History:
    """Writes and shows what happens, a line a step."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.path.touch()
        self.progress: StepProgress | None = None
        self.step_seconds = 0.0
        self._recipe = recipe

    def __enter__(self) -> None:
        self._file = self.path.open("a")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def on_step(self, report: StepReport) -> None:
        self.step_seconds += report.seconds
        entry = {
            "step": report.step,
            "train/loss": report.train_loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens": report.num_tokens,
            "seconds": round(report.seconds, 4),
        }
        self._file.write(json.dumps(entry) + "\n")
        if self.progress:
            rate = report.num_tokens / report.seconds
            self.progress.update(report.step, f"loss {report.train_loss:.3f}, {rate:.0f} tokens/s")

    def on_eval(self, step: int, loss: float, is_best: bool) -> None:
        self._file.write(json.dumps({"step": step, "eval/loss": loss}) + "\n")
        log.info(
            "step %d/%d: eval/loss %.4f%s",
            step,
            self._recipe.planned_steps,
            loss,
            ", the best so far" if is_best else "",
        )
