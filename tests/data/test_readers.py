"""A file of rows is read as a stream or refused in one line. `pytest tests/data/test_readers.py`"""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.json_rows import is_one_object, read_object
from job.data.json_text import ITEM_LIMIT_CHARACTERS, JsonText
from job.data.readers import read_file
from job.data.rows import Row
from job.errors import DataError
from tests.tiers import slow

ROWS = [{"question": f'{n}, "why"?\n', "answer": f"ça {n}."} for n in range(300)]


def zstd(data: bytes) -> bytes:
    packed = pa.compress(data, codec="zstd", asbytes=True)
    assert isinstance(packed, bytes)
    return packed


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, str]], line_end: str = "\r\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=70)
    return file.getvalue()


def read(folder: Path, name: str, data: bytes) -> list[Row]:
    path = folder / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        return list(read_file(name, file, name))


def columns(folder: Path, name: str, data: bytes) -> list[object]:
    rows = read(folder, name, data)
    assert [row.problem for row in rows if row.problem] == []
    return [row.columns for row in rows]


FILES = {
    "rows.jsonl": as_lines(ROWS),
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.csv": as_csv(ROWS),
    "rows.parquet": as_parquet(ROWS),
}
TEXT_FILES = [name for name in FILES if name != "rows.parquet"]


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_compression_is_found_by_content(tmp_path: Path, name: str, end: str) -> None:
    data = FILES[name]
    assert columns(tmp_path, name + end, data) == ROWS
    for packed in (gzip.compress(data), zstd(data)):
        assert columns(tmp_path, name + end, packed) == ROWS


def test_joined_members_and_frames_are_one_file(tmp_path: Path) -> None:
    skippable = struct.pack("<II", 0x184D2A50, 3) + b"abc"  # parallel zstd begins with one
    for pack in (gzip.compress, zstd):
        parts = pack(as_lines(ROWS[:100])), pack(b""), pack(as_lines(ROWS[100:]))
        assert columns(tmp_path, "rows.jsonl", b"".join(parts)) == ROWS
    assert columns(tmp_path, "rows.jsonl", skippable + zstd(as_lines(ROWS))) == ROWS


def without_a_checksum_bit(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("rows.jsonl.gz", gzip.compress(as_lines(ROWS))[:-9], r"is damaged or cut off \(gzip\)"),
        ("rows.jsonl", zstd(as_lines(ROWS))[:-9], r"is damaged or cut off \(zstd\)"),
        ("rows.jsonl", without_a_checksum_bit(gzip.compress(as_lines(ROWS))), "is damaged or cut"),
        ("rows.jsonl", gzip.compress(as_lines(ROWS)) + b"junk", "is damaged or cut off"),
        ("rows.jsonl", zstd(gzip.compress(as_lines(ROWS))), "is compressed twice"),
        ("rows.parquet.gz", gzip.compress(FILES["rows.parquet"]), "is Parquet inside gzip"),
        ("rows.zip", b"PK\x03\x04" + b"x" * 99, r"is compressed \(zip\)"),
        ("rows.json.xz", b"\xfd7zXZ\x00" + b"x" * 99, r"is compressed \(xz\)"),
        ("rows.csv", "a,b\n".encode("utf-16")[:-1], "begins as UTF-16 text and is none"),
        ("rows.txt", b"a,b\n1,2\n", "holds neither JSON, CSV, Parquet nor Arrow"),
        ("rows.json", b'[{"a": 1},', "is not valid JSON after row 1"),
        ("rows.json", b'[{"a": 1}] x', "is not valid JSON after row 1"),
        ("rows.json", b'[{"a": 1} {"a": 2}]', "is not valid JSON after row 1"),
        ("rows.json", b'["\xff"]', "is not valid JSON after row 0"),
        ("rows.json", b"[" * 100_000, "is not valid JSON after row 0"),
        ("rows.json", b'["' + b"x" * (ITEM_LIMIT_CHARACTERS * 2) + b'"]', "next row is over 16 MB"),
        ("rows.csv", b"a,a\n1,2\n", "names a column twice"),
        ("rows.csv", b"a,b,,b,\n1,2,,3,\n", "names a column twice: 'b': give each column a name"),
        (
            "rows.json",
            b'{"a": {"0": "x", "1": "y"}, "b": {"1": "z", "2": "w"}}',
            "has columns with other keys: 'a' has '0', 'b' has not: give every column the same",
        ),
        (
            "rows.json",
            b'{"train": {"a": {"0": "x"}, "b": {"0": "x", "7": "z"}}}',
            "has columns with other keys: 'b' has '7', 'a' has not: give every column the same",
        ),
        ("rows.csv", b'"a' + b"\n" * 2**21, "does not begin with the names of its columns"),
        ("rows.parquet", FILES["rows.parquet"][:-20], "is damaged Parquet"),
    ],
)
def test_a_file_that_is_no_rows_is_one_clear_line(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, name, data)
    message = str(caught.value)
    assert message.startswith(f"JOB_DATASET_URI: {name} ")
    assert "\n" not in message
    assert message.count(": ") >= 2  # what, and the way out


@pytest.mark.parametrize("pack", [zstd, *slow(gzip.compress)])
@pytest.mark.parametrize("line", [b"\0", *slow(b'{"text": "' + b"x" * 2**14 + b'"}\n')])
def test_a_decompression_bomb_ends_in_one_error(
    tmp_path: Path, pack: Callable[[bytes], bytes], line: bytes
) -> None:
    bomb = pack(line * (2**27 // len(line)))
    assert len(bomb) < 2**20
    with pytest.raises(DataError, match="unpacks to over 100 times its size"):
        read(tmp_path, "bomb.jsonl", bomb)


@pytest.mark.slow
def test_a_parquet_bomb_ends_in_one_error(tmp_path: Path) -> None:
    file = io.BytesIO()
    table = pa.table({"text": ["x" * 2**20] * 100})
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    assert len(file.getvalue()) < 2**17
    with pytest.raises(DataError, match="unpacks to over 100 times its size"):
        read(tmp_path, "rows.parquet", file.getvalue())


class Dripping(io.BufferedReader):
    """A file that gives a few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(io.BytesIO(data))
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._size)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON), st.sampled_from([None, 2]), st.booleans(), st.integers(1, 9))
def test_a_json_array_is_the_same_however_its_bytes_arrive(
    items: list[object], indent: int | None, escaped: bool, size: int
) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=escaped)
    encoded = data.encode(errors="replace")
    assert list(JsonText(Dripping(encoded, size)).whole_array()) == json.loads(encoded)


def test_a_json_array_is_not_read_to_its_end_before_its_first_row() -> None:
    file = io.BufferedReader(io.BytesIO(json.dumps(ROWS * 1000).encode()))
    assert next(JsonText(file).whole_array()) == ROWS[0]
    assert file.tell() <= 2**17


def test_a_csv_record_that_is_no_row_is_counted_by_its_problem(tmp_path: Path) -> None:
    data = b"".join(
        [
            b"\xef\xbb\xbfa,b\r\n",
            b"1,2\r\n",
            b"\r\n",
            b'"two\nlines","say ""so"""\n',
            b"1,2,3\n",
            b'"x"y,2\n',
            b"x" * 2**21 + b",2\n",
            b'3,"\xff"\n',
            b'4,"never closed\n' + b"and so on\n" * 2**17,
            b"5,6",
        ]
    )
    rows = read(tmp_path, "rows.csv", data)
    assert [(row.place, row.problem) for row in rows[:6]] == [
        ("rows.csv:2", ""),
        ("rows.csv:4", ""),
        ("rows.csv:6", "not as many values as columns"),
        ("rows.csv:7", "not CSV"),
        ("rows.csv:8", "line over 1 MB"),
        ("rows.csv:9", ""),
    ]
    assert rows[1].columns == {"a": "two\nlines", "b": 'say "so"'}
    assert rows[6].problem == "line over 1 MB"  # the open quote; its rows are refused, not joined
    assert rows[-1].columns == {"a": "5", "b": "6"}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_rows_are_the_same_with_both_line_ends(tmp_path: Path, line_end: str) -> None:
    assert columns(tmp_path, "rows.csv", as_csv(ROWS, line_end)) == ROWS


def test_columns_without_a_name_at_the_end_of_a_csv_file_are_empty(tmp_path: Path) -> None:
    data = b"question,answer,, ,\nWhy?,So.,,,\nWho?,Yes, indeed.,,\nWhen?,Now., ,,\nHow?,So.\n"
    rows = read(tmp_path, "rows.csv", data)
    assert [row.columns for row in rows] == [
        {"question": "Why?", "answer": "So."},
        {},
        {"question": "When?", "answer": "Now."},
        {},
    ]
    problems = "", "a value in a column without a name", "", "not as many values as columns"
    assert tuple(row.problem for row in rows) == problems


def test_any_other_column_without_a_name_is_called_by_its_number(tmp_path: Path) -> None:
    row = {"unnamed column 1": "0", "question": "Why?", "unnamed column 3": "", "answer": "So."}
    assert columns(tmp_path, "rows.csv", b",question,,answer\n0,Why?,,So.\n") == [row]
    assert columns(tmp_path, "rows.csv", b",question,,answer,,\n0,Why?,,So.,,\n") == [row]
    note = {"question": "Why?", "unnamed column 2": "a note"}
    assert columns(tmp_path, "rows.csv", b"question, \nWhy?,a note\n") == [note]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "value",
    [
        ROWS,
        *({wrapper: ROWS} for wrapper in ("data", "train", "rows", "examples", "instances")),
        {"version": "1.1", "data": ROWS, "about": {"by": "us"}},
        {"train": ROWS, "test": ROWS[:9], "notes": ["x"]},
        {"data": {"train": ROWS}},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        {name: {str(k): row[name] for k, row in enumerate(ROWS)} for name in ROWS[0]},
        {"train": {name: [row[name] for row in ROWS] for name in ROWS[0]}},
    ],
)
def test_one_json_value_holds_all_rows(
    tmp_path: Path, name: str, value: object, indent: int | None
) -> None:
    data = json.dumps(value, indent=indent).encode()
    if indent and name == "rows.jsonl" and isinstance(value, dict):
        rows = read(tmp_path, name, data)
        assert {row.problem for row in rows} <= {"not JSON", "not a JSON object"}
        return
    assert columns(tmp_path, name, data) == ROWS
    assert columns(tmp_path, name, gzip.compress(b"\xef\xbb\xbf" + data + b"\n\n")) == ROWS
    assert [row.place for row in read(tmp_path, name, data)][:2] == [f"{name}:1", f"{name}:2"]


def test_columns_by_key_are_paired_by_key(tmp_path: Path) -> None:
    question, answer = {"3": "q3", "0": "q0", "1": "q1"}, {"1": "a1", "3": "a3", "0": "a0"}
    data = json.dumps({"question": question, "answer": answer}).encode()
    expected = [{"question": f"q{n}", "answer": f"a{n}"} for n in (3, 0, 1)]
    assert columns(tmp_path, "rows.json", data) == expected
    data = json.dumps({"question": ["q0", "q1"], "answer": {"1": "a1", "0": "a0"}}).encode()
    assert columns(tmp_path, "rows.json", data) == [
        {"question": "q0", "answer": "a0"},
        {"question": "q1", "answer": "a1"},
    ]


def test_one_row_in_a_file_is_a_row(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}
    scored = {**chat, "scores": {"7": 1, "9": 2}}
    for row in (ROWS[0], chat, {**chat, "tools": [{}, {}]}, {"data": [1, 2], "n": 3}, scored):
        for data in (json.dumps(row), json.dumps(row, indent=1), json.dumps(row) + "\n \n"):
            assert columns(tmp_path, "rows.json", data.encode()) == [row]
    lines = "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()
    assert columns(tmp_path, "rows.json", lines) == ROWS, "objects over several lines"
    wrapped = [{"data": [{"a": 1}]}, {"data": [{"a": 2}]}]
    assert columns(tmp_path, "rows.jsonl", as_lines(wrapped)) == wrapped, "lines are lines"


def test_a_long_array_under_a_name_is_not_read_to_its_end_before_its_first_row() -> None:
    data = json.dumps({"version": 1, "data": ROWS * 3000}).encode()
    assert len(data) > ITEM_LIMIT_CHARACTERS
    file = io.BufferedReader(io.BytesIO(data))
    assert next(read_object("rows.json", file, "rows.json")).columns == ROWS[0]
    assert file.tell() <= 2**17
    assert is_one_object(io.BufferedReader(io.BytesIO(data)), are_lines=False)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", TEXT_FILES)
def test_utf_16_with_its_mark_is_read(tmp_path: Path, name: str, encoding: str) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    data = (mark + FILES[name].decode()).encode(encoding)
    assert columns(tmp_path, name, data) == ROWS
    assert columns(tmp_path, name, gzip.compress(data)) == ROWS


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_semicolons_and_tabs_are_found_from_the_first_line(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    rows = [{"question": f"{n}, why?", "answer": f"so; {n}\tor\nso"} for n in range(9)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    assert columns(tmp_path, name, b"\n\xef\xbb\xbf"[1:] + text.getvalue().encode()) == rows
    assert columns(tmp_path, name, as_csv(rows)) == rows
    assert columns(tmp_path, name, b"text\na;b\nc\td\n") == [{"text": "a;b"}, {"text": "c\td"}]


def test_windows_1252_is_read_where_utf_8_is_not_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": f"Où {n}?", "answer": "“ça” \u2013 5 €"} for n in range(50)]
    text = as_csv(rows).decode()
    assert columns(tmp_path, "rows.csv", text.encode("cp1252")) == rows
    assert columns(tmp_path, "rows.csv.gz", gzip.compress(text.encode("cp1252"))) == rows
    assert caplog.messages == [
        f"data: {name} is not UTF-8 and is read as Windows-1252"
        for name in ("rows.csv", "rows.csv.gz")
    ]
    caplog.clear()
    one_bad = text.encode() + b"\xff,x\r\n"
    assert columns(tmp_path, "rows.csv", one_bad)[:-1] == rows, "one bad byte changes no other row"
    assert caplog.messages == []
