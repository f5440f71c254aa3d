"""The subsample: rows chosen by their hashes and kept on disk; memory holds the hashes only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from job.data.chat import Chat, Message
from job.data.formats import (
    Columns,
    UnusableRowError,
    UnusableRows,
    listing,
    row_chat,
)
from job.data.rows import Row, Source
from job.data.sampling import is_selected, row_hash
from job.errors import DataError, work_dir_error
from job.progress import CountProgress

CHECK_ROWS = 500  # between two looks at should_stop: about a second, of the 15 of a spot machine
_COLUMN_NAMES_LIMIT = 1000


class SelectedRow(NamedTuple):
    """A row of the subsample."""

    row_hash: bytes
    chat: Chat
    place: str


@dataclass(frozen=True)
class SelectionRule:
    """How rows become messages, and which of them are taken."""

    columns: Columns | None
    seed: int
    fraction: float


class Selection:
    """The chosen rows, each once, and what became of the others. A context manager.

    A row that says what a kept one says is counted as a duplicate.
    """

    def __init__(self, rule: SelectionRule, work_dir: Path) -> None:
        self.unusable = UnusableRows()
        self.num_rows = 0
        self.num_duplicates = 0
        self._rule = rule
        self._work_dir = work_dir
        self._columns_seen: set[str] = set()
        self._places: dict[bytes, int] = {}  # row hash -> where its line begins
        self._file = _temporary_file(work_dir)

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, source: Source, should_stop: Callable[[], None]) -> None:
        """Look at every row. Raises `DataError` for no rows and for too many unusable ones."""
        with CountProgress("data: reading", "rows") as progress:
            for row in source.rows(should_stop):
                self.num_rows += 1
                if self.num_rows % CHECK_ROWS == 0:
                    should_stop()
                    progress.advance(CHECK_ROWS)
                try:
                    self._consider(row)
                except UnusableRowError as unusable_row:
                    self.unusable.add(str(unusable_row), row.place)
        if self.num_rows == 0:
            raise DataError(
                "JOB_DATASET_URI: no rows in these files: give files with one row a line"
            )
        self.unusable.check_columns(self._columns_seen, self._rule.columns)
        self.unusable.check_share(
            self.num_rows,
            way_out="name the columns with JOB_PROMPT_COLUMN and JOB_COMPLETION_COLUMN "
            f"(present: {listing(sorted(self._columns_seen))})",
        )

    def _consider(self, row: Row) -> None:
        if row.problem:
            raise UnusableRowError(row.problem)
        columns = self._rule.columns
        if len(self._columns_seen) < _COLUMN_NAMES_LIMIT:
            self._columns_seen.update(row.columns)
        self._columns_seen.update(name for name in columns or () if name in row.columns)
        chat = row_chat(row.columns, columns)
        row_key = row_hash(chat, seed=self._rule.seed)
        if is_selected(row_key, fraction=self._rule.fraction):
            self._keep(row_key, chat, row.place)

    def _keep(self, row_key: bytes, chat: Chat, place: str) -> None:
        if row_key in self._places:
            self.num_duplicates += 1
            return
        line = json.dumps([place, *chat]).encode()
        try:
            self._places[row_key] = self._file.tell()
            self._file.write(line + b"\n")
        except OSError as error:
            raise work_dir_error(self._work_dir, error) from error

    def rows(self) -> Iterator[SelectedRow]:
        """The chosen rows in the order of their hashes, which is the tables' order."""
        try:
            self._file.flush()
            for row_key in sorted(self._places):
                self._file.seek(self._places[row_key])
                place, messages, *others = json.loads(self._file.readline())
                chat = Chat(tuple(Message(*turn) for turn in messages), *others)
                yield SelectedRow(row_key, chat, place)
        except OSError as error:
            raise work_dir_error(self._work_dir, error) from error


def _temporary_file(work_dir: Path) -> IO[bytes]:
    """A file without a name: it is gone with the process, however that ends."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=work_dir)
    except OSError as error:
        raise work_dir_error(work_dir, error) from error
