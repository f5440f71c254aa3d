"""`Watchdog`: ends a process that stands still, after all its threads have said where they stand.

It never ends one that only takes long: what counts is the time without any sign of life. In
training a sign is a micro-batch, of a step or an evaluation; elsewhere bytes that move and memory
that is touched for the first time are signs too, so a slow load or upload lives. The time is
counted in ticks that the process itself lived through: one that was frozen and woken starts where
it stood.
"""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.log import log
from job.process.stop import Stop

PAGE_BYTES = 4096
LAST_ACT_SECONDS = 5.0  # for what `acting_before_the_end` was given: the lease's release


@dataclass(frozen=True)
class Patience:
    """How long a process may be silent, in seconds that it lived through."""

    seconds: float = 300.0
    step_medians: float = 20.0  # in training, if that is longer
    first_step_seconds: float = 900.0  # in training, until a step's length is known
    tick_seconds: float = 5.0
    sign_bytes: int = 1_000_000  # fewer since the last sign are our own housekeeping


@dataclass(frozen=True)
class _Phase:
    """What the process does at present."""

    name: str
    by_bytes: bool  # whether bytes that move are a sign of life
    extra_seconds: float  # the store's own patience with an outage


class Watchdog:
    """Looks for signs of life at every tick, in a thread of its own."""

    def __init__(
        self,
        stop: Stop,
        die: Callable[[str], None],
        *,
        patience: Patience | None = None,
        heartbeat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`die` ends the process with a reason; `heartbeat` is called at every tick."""
        self._stop = stop
        self._die = die
        self._patience = patience or Patience()
        self._heartbeat = heartbeat
        self._clock = clock
        self._phase = _Phase("start-up", by_bytes=True, extra_seconds=0)
        self._phases_entered = 0
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last_step: tuple[int, float] | None = None
        self._signs: tuple[object, ...] = ()
        self._bytes_seen = 0
        self._silence = 0.0
        self._last_act: Callable[[str], None] = lambda _: None

    def start(self) -> None:
        """Start the thread that looks."""
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def phase(
        self, name: str, *, by_bytes: bool = True, outage_minutes: float = 0
    ) -> Iterator[None]:
        """Name what the process does within the block, which sets how long it may be silent.

        With `by_bytes`, bytes that move are a sign of life. `outage_minutes` is how long a phase
        that waits for a store may be silent in addition.
        """
        before = self._phase
        self._phases_entered += 1
        self._phase = _Phase(name, by_bytes, 60 * outage_minutes)
        try:
            yield
        finally:
            self._phases_entered += 1
            self._phase = before

    @contextlib.contextmanager
    def acting_before_the_end(self, act: Callable[[str], None]) -> Iterator[None]:
        """Within the block, a process that hangs calls `act` with the reason before it ends.

        The act runs in a thread of its own and is left alone after `LAST_ACT_SECONDS`.
        """
        before = self._last_act
        self._last_act = act
        try:
            yield
        finally:
            self._last_act = before

    def hear(self, progress: Mapping[str, Any]) -> None:
        """Take note of the optimizer step that an attempt reports."""
        step, at = progress.get("step"), self._clock()
        if step is None:
            return
        if self._last_step is not None and step == self._last_step[0] + 1:
            self._step_seconds.append(at - self._last_step[1])
        self._last_step = (step, at)

    def limit_seconds(self) -> float:
        """The longest silence in the present phase, in seconds."""
        patience, phase = self._patience, self._phase
        if phase.by_bytes:
            return patience.seconds + phase.extra_seconds
        if not self._step_seconds:
            return max(patience.seconds, patience.first_step_seconds)
        # A copy: the main thread may append meanwhile.
        median = statistics.median(self._step_seconds.copy())
        return max(patience.seconds, patience.step_medians * median)

    def look(self, lived_seconds: float) -> str | None:
        """Count the seconds lived since the last look; return why the process hangs, or None."""
        phase, moved = self._phase, _bytes_moved()
        if moved - self._bytes_seen < self._patience.sign_bytes:
            moved = self._bytes_seen
        self._bytes_seen = moved
        signs = (self._phases_entered, self._stop.checks, moved if phase.by_bytes else 0)
        if signs != self._signs:
            self._signs, self._silence = signs, 0.0
            return None
        self._silence += min(lived_seconds, 2 * self._patience.tick_seconds)
        limit = self.limit_seconds()
        if self._silence < limit:
            return None
        return (
            f"hang: no sign of life from {phase.name} for {self._silence:.0f} s, the limit is"
            f" {limit:.0f} s; the stacks of all threads are in the log above"
        )

    def _run(self) -> None:
        last = self._clock()
        while True:
            time.sleep(self._patience.tick_seconds)
            self._heartbeat()
            lived, last = self._clock() - last, self._clock()
            if (reason := self.look(lived)) is not None:
                break
        log.error("%s", reason)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        act = threading.Thread(target=self._last_act, args=(reason,), daemon=True)
        act.start()
        act.join(LAST_ACT_SECONDS)
        self._die(reason)


def _bytes_moved() -> int:
    """Bytes read and written by this process, and memory that it touched for the first time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    moved = PAGE_BYTES * (usage.ru_minflt + usage.ru_majflt)
    with contextlib.suppress(OSError):  # another system than Linux
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        moved += int(counts["rchar"]) + int(counts["wchar"])
    return moved
