"""`Stop`: whether this process was told to end, and how much of the grace time is left."""

from __future__ import annotations

import threading
import time

from job.errors import JobError, OutageError, PreemptedError, is_volume_full

EXIT_MARGIN_SECONDS = 4.0  # the parent kills 3 s before the grace ends; one more to get there


class Stop:
    """Set once by a signal; asked between micro-batches, in evaluation, load and preparation."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._event = threading.Event()
        self._deadline: float | None = None
        self.checks = 0  # how often `check` was asked: the main thread's sign of life

    def set(self, *_: object) -> None:
        """Tell the process to end; fits `signal.signal`. A second call changes nothing."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds - EXIT_MARGIN_SECONDS
            self._event.set()

    def check(self) -> None:
        """Raise `PreemptedError` if the process was told to end."""
        self.checks += 1
        if self._event.is_set():
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
        self._event.wait(seconds)
