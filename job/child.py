"""The process that trains, below process 1: its signals, its watchdog, its ranks."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from job.errors import ExitCode, JobError
from job.log import log
from job.process.heartbeat import beat, open_beat
from job.process.stop import Stop
from job.process.watchdog import Watchdog
from job.settings import Settings
from job.trial.run import run_trial
from job.wandb.client import leave

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
ENDING = (signal.SIGTERM, signal.SIGINT)


def run_as_child(
    settings: Settings,
    pulse_fd: int | None,
    meeting: Path | None,
    *,
    die: Callable[[str], None],
) -> str:
    """Run one trial; its last line. `die` ends the process with the reason for which it hangs."""
    _end_with_parent(signal.SIGTERM)
    faulthandler.enable()  # our parent sends SIGABRT if this process runs no Python any more
    stop = Stop(settings.grace_seconds)
    for number in ENDING:
        signal.signal(number, stop.set)
    watchdog = Watchdog(stop, die, pulse=partial(beat, open_beat(pulse_fd)))
    try:
        line = run_trial(settings, stop, watchdog, meeting)
    except JobError as error:
        told = stop.on_the_way_down(error)
        leave(told.exit_code, has_ranks=meeting is not None)
        raise told from error
    leave(ExitCode.OK)
    return line


def follow_rank_0(settings: Settings, rank: int, meeting: Path) -> int:
    """Be one more GPU of a trial; the exit code. Rank 0 saves at a SIGTERM, our parent ends us."""
    _end_with_parent(signal.SIGKILL)
    for number in ENDING:  # before torch is imported, which takes seconds
        signal.signal(number, signal.SIG_IGN)
    from job.training.device import open_device
    from job.training.follower import follow

    try:
        device = open_device(settings.device, gpu_memory_gb=settings.gpu_memory_gb)
        follow(meeting, rank=rank, size=settings.num_gpus, device=device)
    except JobError as error:
        log.error("rank %d: %s", rank, error)
        leave(error.exit_code, has_ranks=True)
        return int(error.exit_code)
    return 0


def _end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send a signal when our parent dies, even by SIGKILL (Linux; see prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
