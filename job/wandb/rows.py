"""A trial's history as W&B rows: one for every optimizer step, whatever was measured after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

StepMetrics: TypeAlias = dict[str, float]

# Names in the history file that W&B shows as they are.
PLAIN = ("eval/loss", "train/loss", "learning_rate")


class Rows:
    """The rows so far, read from a history file that grows."""

    def __init__(self) -> None:
        self._rows: dict[int, StepMetrics] = {}  # by optimizer step, ascending
        self._offset = 0
        self.is_whole = False  # nothing will be added any more, not even to the last row

    def read(self, path: Path) -> None:
        """Add the lines that were completed since the last call."""
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._add(json.loads(line))

    def after(self, step: int) -> Iterator[tuple[int, StepMetrics]]:
        """The rows of later steps to which nothing will be added any more."""
        last = next(reversed(self._rows), None)
        for at, row in list(self._rows.items()):  # a copy: another thread may read on meanwhile
            if at > step and row and (at != last or self.is_whole):
                yield at, row

    def __len__(self) -> int:
        return sum(1 for row in self._rows.values() if row)

    def _add(self, entry: dict[str, Any]) -> None:
        self._rows.setdefault(entry["step"], {}).update(_metrics(entry))


def _metrics(entry: dict[str, Any]) -> StepMetrics:
    """The metrics of a history line; a loss that overflowed is null there, and left out."""
    row = {name: float(entry[name]) for name in PLAIN if entry.get(name) is not None}
    if entry.get("seconds"):
        row["tokens_per_second"] = round(entry["tokens"] / entry["seconds"], 1)
    if entry.get("peak_memory_bytes") is not None:
        row["peak_memory_gb"] = round(entry["peak_memory_bytes"] / 1e9, 3)
    return row
