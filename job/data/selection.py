"""The subsample: rows chosen by their hashes and kept on disk; memory holds the hashes only."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from job.data.chat import Chat, Message
from job.data.formats import Layout, RowParser
from job.data.rows import Row, Source
from job.data.sampling import HASH_BYTES, is_selected, row_hash
from job.data.unusable import UnusableRowError, UnusableRows, listing
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

    layout: Layout
    seed: int
    fraction: float


class Selection:
    """The chosen rows, and what became of the others. A context manager.

    A row that says what a kept one says is kept, too, and counted as a duplicate.
    """

    def __init__(self, rule: SelectionRule, work_dir: Path) -> None:
        self.unusable = UnusableRows()
        self.num_rows = 0
        self.num_duplicates = 0
        self.num_joined = 0
        self.num_unanswered = 0
        self._rule = rule
        self._work_dir = work_dir
        self._parser = RowParser(rule.layout)
        self._named = rule.layout.named
        self._columns_seen: set[str] = set()
        self._unused: Counter[str] = Counter()  # column -> rows in which it says something
        # A row's key (its hash, and whether it is a pair) -> where its line begins, its copies.
        self._places: dict[bytes, int] = {}
        self._copies: Counter[bytes] = Counter()
        self._file = _temporary_file(work_dir)

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places) + self._copies.total()

    @property
    def columns_not_used(self) -> list[str]:
        """Columns, and keys of turns, that say something in most rows and mean nothing here."""
        num_parsed = self.num_rows - self.unusable.counts.total()
        return sorted(name for name, count in self._unused.items() if 2 * count > num_parsed)

    def read(self, source: Source, should_stop: Callable[[], None]) -> None:
        """Look at every row. Raises `DataError` for no rows and for too many unusable ones."""
        num_broken = 0  # as text: names of columns would not help
        with CountProgress("data: reading", "rows") as progress:
            for row in source.rows(should_stop):
                self.num_rows += 1
                if self.num_rows % CHECK_ROWS == 0:
                    should_stop()
                    progress.advance(CHECK_ROWS)
                num_broken += bool(row.problem)
                try:
                    self._consider(row)
                except UnusableRowError as unusable_row:
                    self.unusable.add(str(unusable_row), row.place)
        if self.num_rows == 0:
            raise DataError(
                "JOB_DATASET_URI: no rows in these files: give files with one row a line"
            )
        self._rule.layout.check_columns(self._columns_seen)
        way_out = (
            "name the columns with JOB_PROMPT_COLUMN (or JOB_PROMPT_TEMPLATE) and "
            f"JOB_COMPLETION_COLUMN (present: {listing(sorted(self._columns_seen))})"
        )
        if 2 * num_broken > self.unusable.counts.total():
            way_out = "leave the files that hold them out of JOB_DATASET_URI"
        self.unusable.check_share(self.num_rows, way_out=way_out)

    def _consider(self, row: Row) -> None:
        if row.problem:
            raise UnusableRowError(row.problem)
        if len(self._columns_seen) < _COLUMN_NAMES_LIMIT:
            self._columns_seen.update(row.columns)
        self._columns_seen.update(name for name in self._named if name in row.columns)
        parsed = self._parser.parse(row.columns)
        if parsed.unused and len(self._unused) < _COLUMN_NAMES_LIMIT:
            self._unused.update(parsed.unused)
        digest = row_hash(parsed.chat, seed=self._rule.seed)
        if is_selected(digest, fraction=self._rule.fraction):
            self.num_joined += parsed.is_joined
            self.num_unanswered += parsed.is_unanswered
            self._keep(digest, parsed.chat, row.place)

    def _keep(self, digest: bytes, chat: Chat, place: str) -> None:
        # A pair's prompt may be rendered otherwise than the same turns: each has its own line.
        row_key, other_key = (digest + bytes([kind]) for kind in (chat.is_pair, not chat.is_pair))
        self.num_duplicates += row_key in self._places or other_key in self._places
        if row_key in self._places:
            self._copies[row_key] += 1
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
                place, *chat = json.loads(self._file.readline())
                row = SelectedRow(row_key[:HASH_BYTES], _chat(*chat), place)
                for _ in range(1 + self._copies[row_key]):
                    yield row
        except OSError as error:
            raise work_dir_error(self._work_dir, error) from error


def _chat(messages: list[list[Any]], tools: list[dict[str, Any]], is_pair: bool) -> Chat:
    """The chat that was written as JSON, which has lists for tuples."""
    turns = (Message(*turn) for turn in messages)
    chats = (turn._replace(tool_calls=tuple(turn.tool_calls)) for turn in turns)
    return Chat(tuple(chats), tuple(tools), is_pair)


def _temporary_file(work_dir: Path) -> IO[bytes]:
    """A file without a name: it is gone with the process, however that ends."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=work_dir)
    except OSError as error:
        raise work_dir_error(work_dir, error) from error
