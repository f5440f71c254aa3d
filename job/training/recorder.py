"""`Recorder`: a trial's history, checkpoints and best adapters, kept while it trains."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from job.errors import PreemptedError
from job.ledger.records import RowLosses
from job.log import log
from job.progress import StepProgress
from job.training.device import peak_memory_bytes
from job.training.eta import StepTimer
from job.training.model import adapter_state, save_adapter
from job.training.state import (
    HISTORY_FILE,
    ROWS_FILE,
    StepReport,
    TrainState,
    read_state,
    write_state,
)
from job.training.trainer import Evaluation, Trainer

CARD_FILE = "README.md"


class Published(Protocol):
    """A folder that was published, and where."""

    @property
    def key(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class Keeper(Protocol):
    """Keeps what must survive this process. It deletes the folders that are given to it."""

    @property
    def resume_dir(self) -> Path | None:
        """The folder of a verified checkpoint to go on from; None to begin at step 0."""

    def is_due(self) -> bool:
        """Whether a checkpoint should be taken now."""

    def put_best(self, folder: Path) -> Published:
        """Keep the best adapter so far."""

    def put_checkpoint(self, folder: Path, step: int, best: str | None) -> None:
        """Keep the checkpoint taken after `step`; `best` is the key of the best adapter so far."""

    def report(self, **progress: Any) -> None:
        """Take note of how far the attempt has come, by name and JSON value."""


class Recorder:
    """Records what happens while a trial trains, and shows it; a context manager around `train`.

    `state` is the trial's: new, or read from the keeper's checkpoint, from which the trainer's
    tensors are restored, too. Left by a `PreemptedError`, the context keeps a last checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        keeper: Keeper,
        work_dir: Path,
        timer: StepTimer,
        *,
        card: Callable[[TrainState], str],
        begun: TrainState,
    ) -> None:
        self.history_path = work_dir / HISTORY_FILE
        self.rows_path = work_dir / ROWS_FILE  # there once an adapter is the best
        self.state = begun
        self._trainer = trainer
        self._keeper = keeper
        self._work_dir = work_dir
        self._timer = timer
        self._card = card
        self._saved_step = -1
        if keeper.resume_dir is None:
            self.history_path.touch()
        else:
            self.state, saved = read_state(keeper.resume_dir)
            trainer.restore(keeper.resume_dir, saved)
            shutil.copyfile(keeper.resume_dir / HISTORY_FILE, self.history_path)
            # A version before this file may have written the checkpoint, or the one before it.
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(keeper.resume_dir / ROWS_FILE, self.rows_path)
            self._saved_step = self.state.step
        self._first_step, self._first_clock = self.state.step, self.state.clock_seconds
        keeper.report(first_step=self.state.step, step=self.state.step, trained_seconds=0.0)

    def __enter__(self) -> None:
        self._history = self.history_path.open(
            "a", buffering=1
        )  # by lines: others read it meanwhile
        planned = self._trainer.recipe.planned_steps
        self._progress = StepProgress("training", planned)
        self._progress.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.__exit__(None, None, None)
        with self._history:
            if kind is not None and issubclass(kind, PreemptedError):
                self._checkpoint()

    def on_step(self, report: StepReport) -> None:
        """Record an optimizer step, and keep a checkpoint if one is due."""
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
        if report.step == self._first_step + 1:
            planned, loss = self._trainer.recipe.planned_steps, report.train_loss
            log.info("step %d/%d: loss %.4f, in %.1f s", report.step, planned, loss, report.seconds)
        self._progress.update(report.step, f"loss {report.train_loss:.3f}, {rate:.0f} tokens/s")
        if line := self._timer.count(self.state, report.num_tokens, report.seconds):
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
        """Record an evaluation: the eval/loss after `step` optimizer steps."""
        self._write({"step": step, "eval/loss": loss})
        planned, note = self._trainer.recipe.planned_steps, ", the best so far" if is_best else ""
        log.info("step %d/%d: eval/loss %.4f%s", step, planned, loss, note)
        if math.isfinite(loss):
            self._keeper.report(eval_loss=loss)

    def on_best(self, measured: Evaluation) -> dict[str, Any]:
        """Publish the adapter as it is, with its card; return key, sha256 and bytes.

        What every row's evaluation gave is kept beside it, and in each later checkpoint.
        """
        rows = RowLosses(
            step=self.state.step,
            nll=tuple(measured.nll.tolist()),
            targets=tuple(measured.targets.tolist()),
        )
        self.rows_path.write_text(json.dumps(rows.to_json()), encoding="utf-8")
        folder = self._work_dir / f"best-{self.state.step}"
        model = self._trainer.model
        save_adapter(model, adapter_state(model), folder)
        (folder / CARD_FILE).write_text(self._card(self.state), encoding="utf-8")
        kept = self._keeper.put_best(folder)
        return {"key": kept.key, "sha256": kept.sha256, "bytes": kept.size_bytes}

    def _checkpoint(self) -> None:
        """Keep a checkpoint of the state between two optimizer steps, unless it is kept already."""
        if self._saved_step == self.state.step or self.state.diverged:
            return
        folder = self._work_dir / f"checkpoint-{self.state.step}"
        folder.mkdir()
        self._history.flush()
        shutil.copyfile(self.history_path, folder / HISTORY_FILE)
        if self.rows_path.exists():
            shutil.copyfile(self.rows_path, folder / ROWS_FILE)
        write_state(folder, self.state, self._trainer.save(folder))
        best = self.state.best["key"] if self.state.best else None
        self._keeper.put_checkpoint(folder, self.state.step, best)
        self._saved_step = self.state.step

    def _write(self, entry: dict[str, Any]) -> None:
        # JSON has no NaN: a loss that overflowed stands as null.
        plain = {k: v if math.isfinite(v) else None for k, v in entry.items()}
        self._history.write(json.dumps(plain, allow_nan=False) + "\n")
