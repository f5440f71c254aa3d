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
    JSON, and for columns whose keys differ.
    """
    yield from _numbered(name, where, lambda: _object_rows(name, JsonText(file), where))


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


def _object_rows(name: str, text: JsonText, where: str) -> Iterator[object]:
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
        rows = _rows_in(values, where)
        yield from [values] if rows is None else rows
    else:  # objects one after another, each written over several lines
        yield values
        while text.next() != "":
            yield text.item()
    text.end()


def _rows_in(value: Mapping[str, Any], where: str) -> list[object] | None:
    """The rows that one object holds under a name or as columns; None if it is a row itself.

    Raises `DataError` for columns whose keys differ.
    """
    for key in _WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            return list(inner)
        if isinstance(inner, dict) and (rows := _rows_in(inner, where)) is not None:
            return rows
    columns = {name: _by_key(items) for name, items in value.items()}
    lengths = {len(items) for items in columns.values()}
    are_objects = all(isinstance(items, dict) for items in value.values())
    if not lengths or 0 in lengths or (len(lengths) > 1 and not are_objects):
        return None
    first = next(iter(columns.values()))
    if any(isinstance(item, dict) and {"role", "from"} & item.keys() for item in first.values()):
        return None  # one row: the turns of a chat
    _check_keys(columns, where)
    return [{name: items[key] for name, items in columns.items()} for key in first]


def _check_keys(columns: Mapping[str, Mapping[str, object]], where: str) -> None:
    """Raise `DataError` if a column has a row that another one lacks: nobody knows the pairs."""
    (name, first), *others = columns.items()
    for other, items in others:
        for has, lacks, keys in (
            (name, other, first.keys() - items.keys()),
            (other, name, items.keys() - first.keys()),
        ):
            if keys:
                what = f"has columns with other keys: {has!r} has {min(keys)!r}, {lacks!r} has not"
                raise unusable(where, what, "give every column the same keys, or write JSON lines")


def _by_key(value: object) -> dict[str, object]:
    """A column's values: those that pandas numbers, or a list's; none of anything else."""
    if isinstance(value, dict) and all(key.isdigit() for key in value):
        return value
    return {str(key): item for key, item in enumerate(value)} if isinstance(value, list) else {}


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
