"""One trial's training, from files on disk to the best adapter, over any number of attempts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from job.data.samples import SampleTable
from job.errors import GpuError, PreemptedError
from job.log import log
from job.progress import StepProgress
from job.training.crew import Crew, CrewPlan
from job.training.device import peak_memory_bytes
from job.training.forecast import Pace
from job.training.loop import TrainOutcome, train
from job.training.memory import MemoryPlan
from job.training.model import (
    adapter_state,
    add_adapters,
    save_adapter,
    trainable_parameters,
)
from job.training.recipe import Recipe
from job.training.rehearsal import rehearse
from job.training.state import HISTORY_FILE, TrainState, read_state, write_state
from job.training.trainer import StepReport, Trainer

CARD_FILE = "README.md"


class Published(Protocol):
    """Where a folder went."""

    @property
    def key(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class Keeper(Protocol):
    """Who keeps what must survive this process. Folders given to it are its own to delete."""

    @property
    def resume_dir(self) -> Path | None:
        """A verified checkpoint to go on from."""

    def is_due(self) -> bool:
        """A checkpoint should be taken now."""

    def put_best(self, folder: Path) -> Published:
        """Keep the best adapter so far."""

    def put_checkpoint(self, folder: Path, step: int, best: str | None) -> None:
        """Keep a checkpoint that refers to the best adapter under the key `best`."""

    def report(self, **progress: Any) -> None:
        """Hear how far the attempt is."""


@dataclass(frozen=True)
class FitInputs:
    """What a training run needs to know beside its recipe."""

    base: Any  # from load_base()
    train_table: SampleTable
    eval_table: SampleTable
    memory: MemoryPlan
    out_of_time: Callable[[TrainState], str | None]  # why the trial has to be cut short
    stop_early: Callable[[TrainState], str | None]  # why the trial is not worth going on
    measure_step_0: bool
    max_adapter_bytes: int
    budget_seconds: float | None = None  # of training clock, for the forecast
    stop_asked: Callable[[], str | None] = lambda: None  # that a person ends the trial
    card: Callable[[TrainState], str] = lambda _: "# LoRA adapter\n"  # README.md of the best one
    crew: CrewPlan | None = None  # several GPUs of this node share the steps


@dataclass(frozen=True)
class Fit:
    """What a training run leaves."""

    status: str  # completed, truncated, diverged or infeasible
    reason: str
    state: TrainState
    history_path: Path  # a JSON line for every optimizer step and evaluation
    peak_memory_bytes: int | None


def fit(
    recipe: Recipe,
    inputs: FitInputs,
    *,
    device: torch.device,
    work_dir: Path,
    keeper: Keeper,
    should_stop: Callable[[], None],
) -> Fit:
    """Train from the keeper's checkpoint or from the start, keep the best adapter.

    When `should_stop` raises `PreemptedError`, the state of the last optimizer step is kept first.
    """
    should_stop()
    model = add_adapters(inputs.base, recipe)
    num_parameters = sum(p.numel() for p in trainable_parameters(model).values())
    log.info("adapter: rank %d, %.2f M parameters", recipe.lora_r, num_parameters / 1e6)
    trainer = Trainer(
        model,
        recipe,
        device=device,
        token_budget=inputs.memory.token_budget,
        recompute=inputs.memory.recompute,
    )
    pace = Pace(recipe, len(inputs.eval_table.input_ids), inputs.budget_seconds)
    run = _Run(trainer, keeper, work_dir, pace, inputs.card)
    infeasible = None
    if 2 * num_parameters > inputs.max_adapter_bytes:
        infeasible = (
            f"adapter would be {2 * num_parameters / 1e6:.0f} MB, limit is"
            f" {inputs.max_adapter_bytes / 1e6:.0f} MB: lower lora_r or raise JOB_MAX_ADAPTER_MB"
        )
    elif keeper.resume_dir is None:  # a checkpoint's plan has proved itself
        infeasible = rehearse(trainer, inputs.train_table, inputs.memory)
    if infeasible is not None:
        outcome = TrainOutcome("infeasible", infeasible, run.state)
    else:
        if inputs.crew is not None:
            tables = (inputs.train_table, inputs.eval_table)
            trainer.crew = Crew.gather(inputs.crew, recipe, tables, device)
        with run:
            outcome = train(
                trainer,
                inputs.train_table,
                inputs.eval_table,
                state=run.state,
                measure_step_0=inputs.measure_step_0,
                out_of_time=inputs.out_of_time,
                stop_early=inputs.stop_early,
                stop_asked=inputs.stop_asked,
                on_step=run.on_step,
                on_eval=run.on_eval,
                on_best=run.on_best,
                should_stop=should_stop,
            )
    if trainer.crew is not None:
        trainer.crew.dismiss()
    return Fit(
        status=outcome.status,
        reason=outcome.reason,
        state=outcome.state,
        history_path=run.history_path,
        peak_memory_bytes=peak_memory_bytes(device),
    )


class _Run:
    """Keeps and shows what happens; a context manager around the training."""

    def __init__(
        self,
        trainer: Trainer,
        keeper: Keeper,
        work_dir: Path,
        pace: Pace,
        card: Callable[[TrainState], str],
    ) -> None:
        self.history_path = work_dir / HISTORY_FILE
        self.state = TrainState()
        self._trainer = trainer
        self._keeper = keeper
        self._work_dir = work_dir
        self._pace = pace
        self._card = card
        self._saved_step = -1
        if keeper.resume_dir is None:
            self.history_path.touch()
        else:
            self.state, saved = read_state(keeper.resume_dir)
            trainer.restore(keeper.resume_dir, saved)
            shutil.copyfile(keeper.resume_dir / HISTORY_FILE, self.history_path)
            self._saved_step = self.state.step
        self._first_clock = self.state.clock_seconds
        keeper.report(first_step=self.state.step, step=self.state.step, trained_seconds=0.0)

    def __enter__(self) -> None:
        self._history = self.history_path.open("a", buffering=1)  # whole lines: it is read along
        planned = self._trainer.recipe.planned_steps
        self._progress = StepProgress("training", planned)
        self._progress.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.__exit__(None, None, None)
        with self._history:
            if kind is not None and issubclass(kind, PreemptedError):
                self._checkpoint()

    def on_step(self, report: StepReport) -> None:
        self._write(
            {
                "step": report.step,
                "train/loss": report.train_loss,
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
                "tokens": report.num_tokens,
                "seconds": round(report.seconds, 4),
                **self._memory(),
            }
        )
        rate = report.num_tokens / report.seconds
        self._progress.update(report.step, f"loss {report.train_loss:.3f}, {rate:.0f} tokens/s")
        if line := self._pace.step(self.state, report.num_tokens, report.seconds):
            log.info("%s", line)
        trained = self.state.clock_seconds - self._first_clock
        self._keeper.report(
            step=report.step, trained_seconds=round(trained, 1), tokens_per_second=round(rate, 1)
        )
        if self._keeper.is_due():
            self._checkpoint()

    def _memory(self) -> dict[str, int]:
        peak = peak_memory_bytes(self._trainer.device)
        return {} if peak is None else {"peak_memory_bytes": peak}

    def on_eval(self, step: int, loss: float, is_best: bool) -> None:
        self._write({"step": step, "eval/loss": loss})
        planned, note = self._trainer.recipe.planned_steps, ", the best so far" if is_best else ""
        log.info("step %d/%d: eval/loss %.4f%s", step, planned, loss, note)
        if math.isfinite(loss):
            self._keeper.report(eval_loss=loss)

    def on_best(self) -> dict[str, Any]:
        folder = self._work_dir / f"best-{self.state.step}"
        model = self._trainer.model
        save_adapter(model, adapter_state(model), folder)
        (folder / CARD_FILE).write_text(self._card(self.state), encoding="utf-8")
        kept = self._keeper.put_best(folder)
        return {"key": kept.key, "sha256": kept.sha256, "bytes": kept.size_bytes}

    def _checkpoint(self) -> None:
        """Keep the state as it is between two optimizer steps, unless it is kept already."""
        if self._saved_step == self.state.step or self.state.diverged:
            return
        folder = self._work_dir / f"checkpoint-{self.state.step}"
        folder.mkdir()
        self._history.flush()
        shutil.copyfile(self.history_path, folder / HISTORY_FILE)
        write_state(folder, self.state, self._trainer.save(folder))
        best = self.state.best["key"] if self.state.best else None
        self._keeper.put_checkpoint(folder, self.state.step, best)
        self._saved_step = self.state.step

    def _write(self, entry: dict[str, Any]) -> None:
        # JSON has no NaN: a loss that overflowed stands as null.
        plain = {k: v if math.isfinite(v) else None for k, v in entry.items()}
        self._history.write(json.dumps(plain, allow_nan=False) + "\n")


def fit_where_there_is_room(
    recipe: Recipe,
    inputs: FitInputs,
    *,
    device: torch.device,
    work_dir: Path,
    keeper: Keeper,
    should_stop: Callable[[], None],
) -> Fit:
    """`fit`; an adapter that cannot even be attached beside the base makes the trial infeasible.

    Raises `GpuError` if it was attached in an earlier attempt: then it is this node's fault.
    """
    try:
        return fit(
            recipe,
            inputs,
            device=device,
            work_dir=work_dir,
            keeper=keeper,
            should_stop=should_stop,
        )
    except torch.OutOfMemoryError as error:  # what follows the attaching handles its own
        if keeper.resume_dir is not None:
            raise GpuError(
                "out of GPU memory while attaching the adapter, which had room in an earlier"
                " attempt: another process uses this card, or it is a smaller one"
            ) from error
    history_path = work_dir / HISTORY_FILE
    history_path.touch()
    reason = "the adapter does not fit the GPU's memory beside the base: lower lora_r"
    return Fit("infeasible", reason, TrainState(), history_path, peak_memory_bytes(device))
