"""JSON as rows: lines, an array, and one object that holds an array of rows or columns."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from job.data.json_text import ITEM_LIMIT_CHARACTERS, JsonText
from job.data.rows import Row, row_of, unusable
from job.log import log

LINE_LIMIT_BYTES = 2**20  # a longer line is not a row of text
_BOM = b"\xef\xbb\xbf"
_WRAPPERS = ("data", "train", "rows", "examples", "instances")  # names of an array of rows
_WRAPPED = re.compile(rb'\s*\{\s*"(?:%s)"\s*:\s*\[\s*\{' % "|".join(_WRAPPERS).encode())


def read_array(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    """The rows of a file that holds one array. Raises `DataError` if it is no valid JSON."""
    yield from _numbered(name, where, JsonText(file).whole_array)


def read_object(name: str, file: io.BufferedReader[Any], where: str) -> Iterator[Row]:
    """The rows of a file that `is_one_object`.

    They are an array under one of a few names, columns (lists of the same length, or objects with
    the same keys, as pandas writes them), or this one row. Raises `DataError` if it is no valid
    JSON.
    """
    yield from _numbered(name, where, lambda: _object_rows(name, JsonText(file)))


def _numbered(name: str, where: str, items: Callable[[], Iterator[object]]) -> Iterator[Row]:
    number = 0
    try:
        for number, value in enumerate(items(), start=1):
            yield row_of(f"{name}:{number}", value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        what = f"is not valid JSON after row {number}, or the next row is over 16 MB"
        raise unusable(where, what, "write one JSON object a line (.jsonl)") from error


def is_one_object(file: io.BufferedReader[Any], *, are_lines: bool) -> bool:
    """Whether a file that begins with an object holds nothing else.

    Reads from `file`: its first line, and what follows up to the first word. `are_lines` says that
    its name promises JSON lines, of which the first one may be damaged.
    """
    line = b"\n"
    while line and not line.strip():
        line = file.readline(ITEM_LIMIT_CHARACTERS + 1).removeprefix(_BOM)
    if isinstance(_json(line), dict):
        return not any(block.strip() for block in iter(lambda: file.read(2**16), b""))
    return not are_lines or (len(line) > LINE_LIMIT_BYTES and bool(_WRAPPED.match(line)))


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _object_rows(name: str, text: JsonText) -> Iterator[object]:
    values: dict[str, object] = {}
    wrapper = ""
    for key in text.members():
        if text.next() != "[" or not (wrapper or key in _WRAPPERS):
            values[key] = text.item()
            continue
        items = text.array()
        first = next(items, None)
        if wrapper or not isinstance(first, dict):
            values[key] = [first, *items] if not wrapper else [None for _ in items]
            continue
        wrapper = key
        yield from chain([first], items)
    if wrapper:
        others = [key for key, value in values.items() if isinstance(value, list | dict)]
        if others:
            log.info("data: of %s only %r is read, not: %s", name, wrapper, ", ".join(others))
    elif text.next() == "":
        rows = _rows_in(values)
        yield from [values] if rows is None else rows
    else:  # objects one after another, each written over several lines
        yield values
        while text.next() != "":
            yield text.item()
    text.end()


def _rows_in(value: Mapping[str, Any]) -> list[object] | None:
    """The rows that one object holds under a name or as columns; None if it is a row itself."""
    for key in _WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            return list(inner)
        if isinstance(inner, dict) and (rows := _rows_in(inner)) is not None:
            return rows
    columns = [_column(column) for column in value.values()]
    if len({len(column) for column in columns}) != 1 or not columns[0]:
        return None
    if any(isinstance(item, dict) and {"role", "from"} & item.keys() for item in columns[0]):
        return None  # one row: the turns of a chat
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


def _column(value: object) -> list[object]:
    """A column's values: a list's, or those that pandas numbers; none of anything else."""
    if isinstance(value, dict) and all(key.isdigit() for key in value):
        return list(value.values())
    return value if isinstance(value, list) else []


def read_lines(name: str, file: io.BufferedReader[Any]) -> Iterator[Row]:
    """The rows of JSON lines; a line that is none becomes a row with a problem."""
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
