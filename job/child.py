"""The process that trains, below process 1: its signals and its watchdog."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable
from functools import partial

from job.errors import ExitCode, JobError
from job.process.heartbeat import beat, open_beat
from job.process.stop import Stop, end_with_parent
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.trial.attempt import Training
from job.trial.run import run_trial
from job.wandb.client import leave

ENDING = (signal.SIGTERM, signal.SIGINT)


def run_as_child(
    settings: Settings,
    heartbeat_fd: int | None,
    *,
    die: Callable[[str], None],
    worker: int | None = None,
    training: Training | None = None,
) -> str:
    """Run one trial and return its last line; `die` ends a process that hangs, given the reason.

    `worker` is the number that the trial's log lines and account have beside those of others.
    Raises the `JobError` that ended the trial, after SIGTERM as `Stop.on_the_way_down` says.
    """
    end_with_parent()
    faulthandler.enable()  # prints all stacks at SIGABRT, which our parent sends if we hang
    stop = Stop(settings.grace_seconds)
    for number in ENDING:
        signal.signal(number, stop.set)
    watchdog = Watchdog(stop, die, heartbeat=partial(beat, open_beat(heartbeat_fd)))
    try:
        line = run_trial(settings, stop, watchdog, training, worker=worker)
    except JobError as error:
        told = stop.on_the_way_down(error)
        leave(told.exit_code)
        raise told from error
    leave(ExitCode.OK)
    return line
