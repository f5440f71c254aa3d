"""`TrainState`: what a trial carries from one optimizer step to the next, beside its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

STATE_FILE = "state.json"
HISTORY_FILE = "history.jsonl"  # a line for every optimizer step and evaluation
ROWS_FILE = "rows.json"  # the evaluation at the best step, by row (`records.RowLosses`)
SCHEMA = 1  # raise it when an older version could not go on from the checkpoint


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
    """How a trial went so far. Adapter and optimizer tensors are kept by the `Trainer`."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None
    best_loss: float = math.inf
    best: dict[str, Any] | None = None  # where the best adapter was published
    evals_without_improvement: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, eval/loss)
    clock_seconds: float = 0.0  # training clock: steps and evaluations that count, nothing else
    step_seconds: float = 0.0  # the part of the training clock that optimizer steps took
    skipped_in_a_row: int = 0  # the latest steps, if their gradients overflowed
    tokens: int = 0  # tokens trained on; there is no padding
    diverged: bool = False
    untuned_16bit: float | None = None  # the base's eval/loss with its weights in 16 bits

    def to_json(self) -> dict[str, Any]:
        """The state as JSON; an infinite `best_loss`, which JSON cannot hold, becomes null."""
        best_loss = self.best_loss if math.isfinite(self.best_loss) else None
        content = {**asdict(self), "best_loss": best_loss}
        # An earlier version reads no key that it does not know: it stands beside the state.
        del content["untuned_16bit"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The state that `to_json` wrote."""
        best_loss = math.inf if content["best_loss"] is None else content["best_loss"]
        curve = [(step, loss) for step, loss in content["curve"]]
        return cls(**{**content, "best_loss": best_loss, "curve": curve})


def write_state(folder: Path, state: TrainState, trainer: dict[str, Any]) -> None:
    """Write `state.json`; `trainer` is what `Trainer.save` returned."""
    content = {
        "schema": SCHEMA,
        "state": state.to_json(),
        "untuned_16bit": state.untuned_16bit,
        "trainer": trainer,
    }
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1, allow_nan=False))


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Read the state, and what `Trainer.restore` needs, from a checkpoint's folder."""
    content = json.loads((folder / STATE_FILE).read_text())
    state = TrainState.from_json(content["state"])
    state.untuned_16bit = content.get("untuned_16bit")
    return state, content["trainer"]


def saved_clock_seconds(folder: Path) -> float:
    """Read the training clock of a checkpoint."""
    return read_state(folder)[0].clock_seconds


def unreadable(folder: Path) -> str | None:
    """Say why this version of the code cannot go on from a checkpoint; None if it can."""
    schema = json.loads((folder / STATE_FILE).read_text()).get("schema")
    if schema == SCHEMA:
        return None
    return (
        f"has checkpoint schema {schema}, this version reads {SCHEMA}: use the image it began with"
    )
