"""`Stop`: whether this process was told to end, and how much of the grace time is left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from job.errors import JobError, OutageError, PreemptedError, is_volume_full

EXIT_MARGIN_SECONDS = 4.0  # the parent kills 3 s before the grace ends; one more to get there
POLL_SECONDS = 0.05  # how late a wait may see that it is to end
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel send us SIGTERM when our parent dies, even by SIGKILL (Linux, prctl(2)).

    `parent`: its process id; one that has died before is told by it.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def sleep_until(is_told: Callable[[], bool], seconds: float) -> None:
    """Sleep for `seconds`, but hardly longer than until `is_told`.

    Takes no lock: a `threading.Event` that a signal handler sets stands still for ever if the
    signal comes while the main thread is inside its `wait` or `set`.
    """
    deadline = time.monotonic() + seconds
    while not is_told() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, POLL_SECONDS))


class Stop:
    """Set once by a signal; asked between micro-batches, in evaluation, load and preparation."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None
        self.checks = 0  # how often `check` was asked: the main thread's sign of life

    def set(self, *_: object) -> None:
        """Tell the process to end; fits `signal.signal`. A second call changes nothing."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds - EXIT_MARGIN_SECONDS

    def check(self) -> None:
        """Raise `PreemptedError` if the process was told to end."""
        self.checks += 1
        if self._deadline is not None:
            raise PreemptedError("told to end")

    def on_the_way_down(self, error: JobError) -> JobError:
        """The error that a process ends with after it met `error`.

        After SIGTERM only a full volume is told: whatever else fails must not count as a try.
        """
        told = self._deadline is None or isinstance(error, PreemptedError)
        if told or (isinstance(error, OutageError) and is_volume_full(error)):
            return error
        return PreemptedError(f"told to end; on the way down: {error}")

    def seconds_left(self) -> float | None:
        """Seconds until the process has to be gone; None if nobody told it to end."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until the process is told to end."""
        sleep_until(lambda: self._deadline is not None, seconds)
