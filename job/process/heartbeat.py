"""The supervisor's look at its child: a byte at every tick of the child's watchdog, through a pipe.

A child whose main thread sits in C code that holds the interpreter's lock runs no other thread
either, its watchdog included; only another process can tell.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from job.log import log


@dataclass(frozen=True)
class HeartbeatLimits:
    """How long a child may be silent, in seconds that both processes lived through."""

    silence_seconds: float = 600.0  # twice the child's own patience: the code may only be slow
    tick_seconds: float = 5.0
    words_seconds: float = 10.0  # from SIGABRT, which dumps the stacks, to SIGKILL


def open_beat(descriptor: int | None) -> tuple[int, ...]:
    """Prepare the child's end of the pipe for `beat`; empty where no supervisor listens."""
    if descriptor is None:
        return ()
    os.set_blocking(descriptor, False)
    os.set_inheritable(descriptor, False)
    return (descriptor,)


def beat(descriptors: tuple[int, ...]) -> None:
    """Tell the supervisor that this process lives; one that has gone is no reason to stop."""
    for descriptor in descriptors:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(descriptor, b".")


class HeartbeatMonitor:
    """Listens to one child from its first beat on, and ends it when it falls silent."""

    def __init__(self, limits: HeartbeatLimits | None = None) -> None:
        self._limits = limits or HeartbeatLimits()
        self._read, self.write_end = os.pipe()
        self._closing = threading.Event()
        self.found_silent = False

    def listen(self, pid: int) -> None:
        """Start listening to the child `pid`, which leads a process group of its own.

        Call it once the child has `write_end`, which is closed here.
        """
        os.close(self.write_end)
        threading.Thread(
            target=self._run, args=(pid,), daemon=True, name="heartbeat monitor"
        ).start()

    def close(self) -> None:
        """Stop listening. Call it when the child has ended: its process id may be reused soon."""
        self._closing.set()

    def _run(self, pid: int) -> None:
        limits, heard, silence, last = self._limits, False, 0.0, time.monotonic()
        while not self._closing.is_set():
            ready = select.select([self._read], [], [], limits.tick_seconds)[0]
            lived, last = time.monotonic() - last, time.monotonic()
            if ready:
                if not os.read(self._read, 65536):
                    break  # the child closed its end, or has ended
                heard, silence = True, 0.0
                self._closing.wait(limits.tick_seconds / 10)
            elif heard and not _is_stopped(pid):
                silence += min(lived, 2 * limits.tick_seconds)
            if silence >= limits.silence_seconds:
                self._end(pid, silence)
                break
        os.close(self._read)

    def _end(self, pid: int, silence: float) -> None:
        """Have the child's process group dump its stacks, then kill it."""
        log.error("hang: the trial runs no Python any more since %.0f s; its stacks:", silence)
        self.found_silent = True
        for number in (signal.SIGABRT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
            if self._closing.wait(self._limits.words_seconds):
                return


def _is_stopped(pid: int) -> bool:
    """Whether a process is frozen by SIGSTOP or a debugger, or gone: its silence says nothing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True  # gone
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
