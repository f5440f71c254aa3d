"""Rows of one open file, read as a stream: JSON, CSV, Parquet or Arrow."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from job.data.csv_rows import csv_encoding, read_csv
from job.data.file_names import kind_of
from job.data.json_rows import is_one_object, read_array, read_lines, read_object
from job.data.rows import SUPPORTED, Row, explained, unusable
from job.data.unpacking import as_utf8, expansion_limit, head, unpacked

_BATCH_ROWS = 1000
_BATCH_BYTES = 2**24  # a batch of Parquet rows, as stored; in memory it is larger
_PAGE_BUFFER_BYTES = 2**20  # else pyarrow reads a column of a whole row group at once
_BOM = b"\xef\xbb\xbf"
_ARROW_MAGIC = (b"ARROW1", b"\xff\xff\xff\xff")  # of a file, of a stream


def read_file(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    """The rows of `file`, which can seek; `name` is for their places, `where` for errors.

    The content decides the format, because many `.json` files hold JSON lines; where it cannot,
    the name does. Raises `DataError` for a file that cannot be read as a whole.
    """
    with explained(where):
        stream = unpacked(file, where)
        start = head(stream)
        if start.startswith(b"PAR1"):
            yield from _read_parquet(name, stream, where)
        elif start.startswith(_ARROW_MAGIC):
            yield from _read_arrow(name, stream, where)
        else:
            yield from _read_text(name, lambda: _text_of(file, where), where)


def _read_text(
    name: str, reopened: Callable[[], io.BufferedReader[Any]], where: str
) -> Iterator[Row]:
    stream = reopened()
    kind = kind_of(name)
    first = head(stream).removeprefix(_BOM).lstrip()[:1]
    if first == b"[":
        yield from read_array(name, stream, where)
    elif first == b"{" and is_one_object(stream, are_lines=kind == "JSONL"):
        yield from read_object(name, reopened(), where)
    elif kind == "JSONL" or first in (b"{", b""):
        yield from read_lines(name, reopened())
    elif kind == "CSV":
        encoding = csv_encoding(stream)
        yield from read_csv(name, reopened(), where, encoding=encoding)
    else:
        raise unusable(where, "holds neither JSON, CSV, Parquet nor Arrow", f"give {SUPPORTED}")


def _text_of(file: io.BufferedReader[Any], where: str) -> io.BufferedReader[Any]:
    """The file from its beginning, unpacked, and as UTF-8 if it is UTF-16 with its mark."""
    file.seek(0)
    return as_utf8(unpacked(file, where), where)


def _read_arrow(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    """Rows of an Arrow stream, as `datasets` saves them, or of an Arrow file."""
    number = 0
    try:
        for batch in _arrow_batches(file):
            batch.validate(full=True)
            for start in range(0, len(batch), _BATCH_ROWS):
                for columns in table_rows(batch.slice(start, _BATCH_ROWS)):
                    number += 1
                    place = f"{name}:{number}"
                    yield Row(place, columns or {}, "" if columns is not None else "not readable")
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise unusable(where, "is damaged Arrow", "write it again") from error


def _arrow_batches(file: io.BufferedReader[Any]) -> Iterator[Any]:
    if head(file).startswith(_ARROW_MAGIC[0]):
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


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
