"""How far a trial is: a bar on a terminal, a plain line now and then everywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from job.log import log

LINE_SECONDS = 30.0  # between plain lines


class StepProgress:
    """Progress over `total` steps; a context manager around the work."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str, *, total: int | None = None) -> None:
        """Say that `done` of the total are done; `total` corrects it."""
        self._total = total or self._total
        if self._bar:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            log.info("%s: %d/%d, %s", self._title, done, self._total, note)
