"""`Attempt`: all that one attempt at a slot rests on, and the training that it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.ledger.lease import Lease
from job.ledger.ledger import Ledger
from job.ledger.uploads import Publisher
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.store.documents import Json
from job.sweep.definition import SweepDefinition
from job.trial.result import AttemptClock
from job.wandb.run import Mirror

if TYPE_CHECKING:
    import torch

    from job.training.fit import Fit


@dataclass(frozen=True)
class Training:
    """The training that a trial uses; tests give one without torch."""

    open_device: Callable[[Settings], torch.device]
    load_base: Callable[[BaseModel, torch.device], Any]
    # Trains the attempt's spec in a work folder; the publisher keeps what must survive.
    fit: Callable[[Attempt, Publisher, Path], Fit]


@dataclass(frozen=True)
class Attempt:
    """All that one attempt at a slot rests on."""

    settings: Settings
    definition: SweepDefinition
    ledger: Ledger
    lease: Lease
    spec: Json
    base: BaseModel
    data: PreparedData
    device: torch.device
    model: Any  # the loaded base
    clock: AttemptClock
    stop: Stop
    watchdog: Watchdog
    mirror: Mirror

    def stop_asked(self) -> str | None:
        """That somebody ended the trial on W&B, in words."""
        return "stopped on W&B" if self.mirror.stop_requested.is_set() else None

    def should_stop(self) -> None:
        """Raise `PreemptedError` if this attempt has to end: asked between micro-batches."""
        if self.lease.lost:
            self.lease.ensure_held()
        self.stop.check()
