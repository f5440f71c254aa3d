"""Whatever a file holds, it is rows or one error. `pytest tests/data/test_fuzz.py`"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.errors import DataError
from tests.data.test_readers import FILES as READERS_FILES
from tests.data.test_readers import ROWS, read, zstd


def check_rows_or_one_error(folder: Path, name: str, data: bytes) -> None:
    rows, message = [], None
    try:
        rows = read(folder, name, data)
    except DataError as error:
        message = str(error)
    if message is not None:
        assert message.startswith(f"JOB_DATASET_URI: {name} ")
        assert "\n" not in message
    assert all(isinstance(row.columns, dict) for row in rows)
    assert all(not row.columns for row in rows if row.problem)


NAMES = ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.jsonl.gz", "x.csv.zst"]
STARTS = [
    *(b"", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"[", b"{", b'{"data": [', b'{"a":\n'),
    *(b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b'a,b\n"', b"\xff\xfe", b"\xfe\xff\0{\0}"),
]


def as_arrow(new: Callable[..., Any]) -> bytes:
    table, file = pa.Table.from_pylist(ROWS), io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return file.getvalue()


FILES = {
    **READERS_FILES,
    "wrapped.json": json.dumps({"data": ROWS, "n": 1}).encode(),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "utf16.csv": READERS_FILES["rows.csv"].decode().encode("utf-16"),
    "1252.csv": READERS_FILES["rows.csv"].decode().encode("cp1252"),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "file.arrow": as_arrow(pa.ipc.new_file),
}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(NAMES), st.sampled_from(STARTS), st.binary(max_size=200))
def test_any_bytes_are_rows_or_one_error(
    tmp_path: Path, name: str, start: bytes, rest: bytes
) -> None:
    check_rows_or_one_error(tmp_path, name, start + rest)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(list(FILES)),
    st.sampled_from(["", "gzip", "zstd"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1.5),
)
def test_a_damaged_file_is_rows_or_one_error(
    tmp_path: Path, name: str, packing: str, changes: list[tuple[float, int]], length: float
) -> None:
    data = bytearray({"": bytes, "gzip": gzip.compress, "zstd": zstd}[packing](FILES[name]))
    for place, value in changes:
        data[min(len(data) - 1, int(place * len(data)))] = value
    check_rows_or_one_error(tmp_path, name, bytes(data[: int(length * len(data))]))
