"""CSV as rows: the first record names the columns, and all values are strings."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from job.data.rows import Row, unusable
from job.data.unpacking import head
from job.data.unusable import listing
from job.log import log

RECORD_LIMIT_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"


def csv_encoding(file: io.BufferedReader[Any]) -> str:
    """UTF-8, or Windows-1252 where most lines beyond ASCII are no UTF-8. Reads the whole file."""
    if head(file).startswith(_BOM):
        return "utf-8"
    num_utf8 = num_others = 0
    while line := file.readline(RECORD_LIMIT_BYTES):
        if not line.isascii():
            try:
                line.decode()
                num_utf8 += 1
            except UnicodeDecodeError:
                num_others += 1
    return "utf-8" if num_others <= num_utf8 else "cp1252"


def read_csv(
    name: str, file: io.BufferedReader[Any], where: str, *, encoding: str = "utf-8"
) -> Iterator[Row]:
    """The rows of a CSV file by RFC 4180: commas, and double-quoted fields with line ends.

    Semicolons or tabs are taken where the first line has no comma between two names.
    `name` is for the rows' places, `where` for errors.
    Raises `DataError` if the names of the columns are not all different.
    """
    csv.field_size_limit(RECORD_LIMIT_BYTES)  # for the whole process; Python's own limit is 128 KiB
    if encoding != "utf-8":
        log.warning("data: %s is not UTF-8 and is read as Windows-1252", name)
    delimiter = _delimiter(head(file))
    lines = _Lines(file, encoding)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    num_values = 0
    while True:
        first_line = lines.start_record()
        place = f"{name}:{first_line}"
        try:
            values = next(reader, None)
        except (csv.Error, _RecordTooLongError) as error:
            if header is None:
                raise unusable(
                    where, "does not begin with the names of its columns", _WAY_OUT
                ) from error
            problem = "line over 1 MB" if isinstance(error, _RecordTooLongError) else "not CSV"
            yield Row(place, {}, problem)
            continue
        if values is None:
            return
        if not values:
            continue  # a blank line is no row
        if header is None:
            header, num_values = _columns(values, where), len(values)
        else:
            yield _row(place, header, values, num_values)


def _row(place: str, header: list[str], values: list[str], num_values: int) -> Row:
    """The row of these values, of which those after the last name have to be empty."""
    if len(values) != num_values:
        return Row(place, {}, "not as many values as columns")
    if any(value.strip() for value in values[len(header) :]):
        return Row(place, {}, "a value in a column without a name")
    return Row(place, dict(zip(header, values, strict=False)))


def _columns(names: list[str], where: str) -> list[str]:
    """The columns' names; two or more empty ones at the end, as Excel writes them, are left out.

    Any other column without a name is called by its number. Raises `DataError` if a name stands
    there twice.
    """
    num_named = max((n for n, name in enumerate(names, 1) if name.strip()), default=0)
    if len(names) - num_named > 1:
        names = names[:num_named]
    names = [name if name.strip() else f"unnamed column {n}" for n, name in enumerate(names, 1)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        what = f"names a column twice: {listing(list(map(repr, twice)))}"
        raise unusable(where, what, "give each column a name of its own in its first line")
    return names


def _delimiter(start: bytes) -> str:
    """What stands between the names in the first line: a comma, else a semicolon, else a tab."""
    text = start.removeprefix(_BOM).decode(errors="replace").strip("\r\n")
    line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    for delimiter in (",", ";", "\t"):
        with suppress(csv.Error):
            if len(next(csv.reader([line], delimiter=delimiter), [])) > 1:
                return delimiter
    return ","


_WAY_OUT = "write the columns' names into its first line"


class _RecordTooLongError(Exception):
    """A record over the limit: an open quote would make one of the rest of the file."""


class _Lines:
    """The file's lines as text; unlike a generator it goes on after an exception."""

    def __init__(self, file: io.BufferedReader[Any], encoding: str) -> None:
        self._file = file
        self._encoding = encoding
        self._num_lines = 0
        self._record_bytes = 0

    def start_record(self) -> int:
        """The number of the line that comes next, from 1."""
        self._record_bytes = 0
        return self._num_lines + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(RECORD_LIMIT_BYTES + 1)
        if not line:
            raise StopIteration
        self._num_lines += 1
        self._record_bytes += len(line)
        if self._record_bytes > RECORD_LIMIT_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(RECORD_LIMIT_BYTES)
            raise _RecordTooLongError
        if self._num_lines == 1:
            line = line.removeprefix(_BOM)
        # A byte that is no text becomes half a surrogate pair, which a row's check refuses.
        return line.decode(self._encoding, errors="surrogateescape")
