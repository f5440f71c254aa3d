"""Rows of one open file, read as a stream: JSON lines, a JSON array, CSV or Parquet."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from job.data.csv_rows import read_csv
from job.data.file_names import kind_of
from job.data.json_array import array_items
from job.data.rows import SUPPORTED, Row, explained, row_of, unusable
from job.data.unpacking import expansion_limit, head, unpacked

LINE_LIMIT_BYTES = 2**20  # a longer line is not a row of text
_BATCH_ROWS = 1000
_BATCH_BYTES = 2**24  # a batch of Parquet rows, as stored; in memory it is larger
_PAGE_BUFFER_BYTES = 2**20  # else pyarrow reads a column of a whole row group at once
_BOM = b"\xef\xbb\xbf"


def read_file(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    """The rows of `file`; `name` is for their places, `where` for errors.

    The content decides the format, because many `.json` files hold JSON lines; where it cannot,
    the name does. Raises `DataError` for a file that cannot be read as a whole.
    """
    with explained(where):
        stream = unpacked(file, where)
        start = head(stream)
        first = start.removeprefix(_BOM).lstrip()[:1]
        kind = kind_of(name)
        if start.startswith(b"PAR1"):
            yield from _read_parquet(name, stream, where)
        elif start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise unusable(where, "is UTF-16 text or no text", "save it as UTF-8")
        elif kind == "JSONL" or first in (b"{", b""):
            yield from _read_lines(name, stream)
        elif first == b"[":
            yield from _read_array(name, stream, where)
        elif kind == "CSV":
            yield from read_csv(name, stream, where)
        else:
            raise unusable(where, "holds neither JSON, CSV nor Parquet", f"give {SUPPORTED}")


def _read_lines(name: str, file: io.BufferedReader[Any]) -> Iterator[Row]:
    number = 0
    while line := file.readline(LINE_LIMIT_BYTES + 1):
        number += 1
        place = f"{name}:{number}"
        if len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):
            _skip_line(file)
            yield Row(place, {}, "line over 1 MB")
        else:
            yield from _parse_line(place, line.removeprefix(_BOM) if number == 1 else line)


def _skip_line(file: io.BufferedReader[Any]) -> None:
    while (part := file.readline(LINE_LIMIT_BYTES)) and not part.endswith(b"\n"):
        pass


def _parse_line(place: str, line: bytes) -> Iterator[Row]:
    if not line.strip():
        return  # a blank line is no row
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        yield Row(place, {}, "not UTF-8")
    except (ValueError, RecursionError):  # also integers of over 4300 digits
        yield Row(place, {}, "not JSON")
    else:
        yield row_of(place, value)


def _read_array(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    number = 0
    try:
        for number, value in enumerate(array_items(file), start=1):
            yield row_of(f"{name}:{number}", value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        what = f"is not valid JSON after row {number}, or the next row is over 16 MB"
        raise unusable(where, what, "write one JSON object a line (.jsonl)") from error


def _read_parquet(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(file, buffer_size=_PAGE_BUFFER_BYTES) as table:
            batch_size = _check_parquet(table.metadata, os.fstat(file.fileno()).st_size, where)
            for batch in table.iter_batches(batch_size=batch_size, use_threads=False):
                for columns in table_rows(batch):
                    number += 1
                    place = f"{name}:{number}"
                    yield Row(place, columns or {}, "" if columns is not None else "not readable")
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise unusable(where, "is damaged Parquet", "write it again") from error


def _check_parquet(metadata: Any, size_bytes: int, where: str) -> int:
    """How many rows to take at once. Raises `DataError` if the file unpacks to far too much."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > expansion_limit(size_bytes):
        raise unusable(where, "unpacks to over 100 times its size", "write it again")
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, int(min(_BATCH_ROWS, _BATCH_BYTES / max(1.0, row_bytes))))


def table_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of a record batch; None for one whose values Python cannot hold (bad UTF-8, dates)."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        if len(batch) == 1:
            yield None
            return
        for index in range(len(batch)):
            yield from table_rows(batch.slice(index, 1))
