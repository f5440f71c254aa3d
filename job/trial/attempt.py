"""`Attempt`: one attempt at a slot with all that it uses; `Training`, which tests replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.base_model import BaseModel
from job.data.prepared import PreparedData
from job.ledger.lease import HeldLease
from job.ledger.records import Spec
from job.ledger.slot import Slot
from job.ledger.uploads import Uploads
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.sweep.definition import SweepDefinition
from job.trial.draw import Drawn
from job.trial.result import AttemptClock
from job.trial.weights import BaseWeights
from job.wandb.run import Mirror

if TYPE_CHECKING:
    import torch

    from job.training.fit import Fit


@dataclass(frozen=True)
class Training:
    """The training that a trial uses; tests give one without torch."""

    open_device: Callable[[Settings], torch.device]
    load_base: Callable[[BaseModel, torch.device, str], Any]  # in this precision
    # Trains the attempt's spec in a work folder; the uploads keep what must survive.
    fit: Callable[[Attempt, Uploads, Path], Fit]
    # The bytes that the device may hold; None: a CPU.
    usable_bytes: Callable[[Settings, torch.device], int | None] = lambda _settings, _device: None


@dataclass(frozen=True)
class Loaded:
    """The loaded base, rows and device, which serve an attempt at any slot of the sweep."""

    base: BaseModel
    data: PreparedData
    device: torch.device
    weights: BaseWeights
    mixed: str | None  # what a plain `mixed` of this sweep is here; None: it has none
    prepare_seconds: float  # on a node that is paid for, like those of loading
    load_seconds: float


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a slot, with all that it uses."""

    settings: Settings
    definition: SweepDefinition
    lease: HeldLease
    spec: Spec
    loaded: Loaded
    clock: AttemptClock
    stop: Stop
    watchdog: Watchdog
    mirror: Mirror

    @property
    def slot(self) -> Slot:
        """The slot that the attempt is at, in the generation of its lease."""
        return self.lease.slot

    def stop_asked(self) -> str | None:
        """Say that somebody stopped the trial on W&B; None if nobody did."""
        return "stopped on W&B" if self.mirror.stop_requested.is_set() else None

    def should_stop(self) -> None:
        """Raise `PreemptedError` if this attempt has to end: asked between micro-batches."""
        if self.lease.lost:
            self.lease.ensure_held()
        self.stop.check()


def begin_attempt(
    settings: Settings,
    definition: SweepDefinition,
    lease: HeldLease,
    drawn: Drawn,
    loaded: Loaded,
    *,
    stop: Stop,
    watchdog: Watchdog,
) -> Attempt:
    """Begin to train a slot: its GPU-seconds count from here on, and all that came before it."""
    lease.start_paying(seconds_before=loaded.prepare_seconds + loaded.load_seconds)
    lease.report(patience_seconds=2 * settings.checkpoint_minutes * 60, gpu=_card(loaded.device))
    return Attempt(
        settings=settings,
        definition=definition,
        lease=lease,
        spec=drawn.spec,
        loaded=loaded,
        clock=AttemptClock(
            settings,
            lease,
            prepare_seconds=loaded.prepare_seconds,
            load_seconds=loaded.load_seconds,
        ),
        stop=stop,
        watchdog=watchdog,
        mirror=Mirror(settings, lease, drawn.spec, drawn.agent_run, stop=stop),
    )


def _card(device: torch.device | None) -> str | None:
    """The name of the card; None for a CPU."""
    if device is None or device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name(device)
