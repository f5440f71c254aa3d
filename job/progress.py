"""Shows how far work is: bars on a terminal, a plain line now and then everywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from job.log import is_marked, log

LINE_SECONDS = 30.0  # between plain lines
_BAR_SECONDS = 1.0  # work that is done by then needs no bar

Clock = Callable[[], float]


class StepProgress:
    """Progress over `total` steps; a context manager around the work."""

    def __init__(self, title: str, total: int, *, clock: Clock = time.monotonic) -> None:
        self._total = total
        self._display = _Display(title, clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.close()

    def update(self, done: int, note: str, *, total: int | None = None) -> None:
        """Say that `done` of the total are done; `total` corrects it."""
        self._total = total or self._total
        self._display.show(done, self._total, f"{done}/{self._total}, {note}")


class CountProgress:
    """Progress of bytes or rows, with their rate; a context manager around the work.

    Any thread may report. Work that was long enough to be shown ends with a line of its own.
    """

    def __init__(
        self,
        title: str,
        unit: Literal["bytes", "rows"],
        *,
        total: int | None = None,  # bytes or rows, as in advance(); None: not known
        clock: Clock = time.monotonic,
    ) -> None:
        self._title = title
        self._unit = unit
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._clock = clock
        self._begun = clock()
        self._display = _Display(title, clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        shown = self._display.close()
        if shown and kind is None:
            seconds = self._clock() - self._begun
            log.info("%s: done, %s in %.0f s", self._title, self._text(), seconds)

    def expect(self, total: int) -> None:
        """Set the total, where it is only known once the work has begun."""
        self._total = total

    def advance(self, num: int) -> None:
        """Say that so many more are done; negative where a try starts over."""
        with self._lock:
            self._done += num
            self._display.show(self._done, self._total, self._text())

    def _text(self) -> str:
        rate = self._done / max(1e-3, self._clock() - self._begun)
        if self._unit == "bytes":
            of = "" if self._total is None else f" of {size(self._total)}"
            return f"{size(self._done)}{of}, {size(rate)}/s"
        of = "" if self._total is None else f" of {self._total:,}"
        return f"{self._done:,}{of} rows, {rate:,.0f} rows/s"


class _Display:
    """One line of the terminal's bars, or plain lines in the log."""

    def __init__(self, title: str, clock: Clock) -> None:
        self._title = title
        self._clock = clock
        self._begun = self._last_line = clock()
        self._task: TaskID | None = None
        self._shown = False

    def show(self, done: int, total: int | None, text: str) -> None:
        now = self._clock()
        if sys.stderr.isatty() and not is_marked():
            if self._task is None and now - self._begun >= _BAR_SECONDS:
                self._task, self._shown = _BARS.add(self._title), True
            if self._task is not None:
                _BARS.update(self._task, done, total, text)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line, self._shown = now, True
            log.info("%s: %s", self._title, text)

    def close(self) -> bool:
        """Remove the bar; return whether anything was shown."""
        if self._task is not None:
            _BARS.remove(self._task)
            self._task = None
        return self._shown


class _Bars:
    """The terminal's one live display: rich cannot have two, and uploads go on while we train."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: Progress | None = None

    def add(self, title: str) -> TaskID:
        with self._lock:
            if self._live is None:
                self._live = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TextColumn("{task.fields[text]}", markup=False),
                    TimeRemainingColumn(),
                    console=Console(stderr=True),
                    transient=True,
                )
                self._live.start()
            return self._live.add_task(title, total=None, text="")

    def update(self, task: TaskID, done: int, total: int | None, text: str) -> None:
        with self._lock:
            if self._live is not None:
                self._live.update(task, completed=done, total=total, text=text)

    def remove(self, task: TaskID) -> None:
        with self._lock:
            assert self._live is not None
            self._live.refresh()  # or what ends between two pictures was never seen
            self._live.remove_task(task)
            if not self._live.tasks:
                self._live.stop()
                self._live = None


_BARS = _Bars()


def size(num_bytes: float) -> str:
    """Bytes in words, by powers of ten as JOB_MAX_ADAPTER_MB counts: 34.1 kB, 336 MB."""
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.9995 * unit_bytes:  # 999.6 kB would be rounded to 1e+03
            amount = num_bytes / unit_bytes
            return f"{amount:.0f} {unit}" if amount >= 99.95 else f"{amount:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
