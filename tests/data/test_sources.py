"""Rows are read alike from every kind of file. `pytest tests/data/test_sources.py`"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.json_rows import LINE_LIMIT_BYTES
from job.data.rows import Row, SourceVersion
from job.data.sources import open_source
from job.errors import DataError, SettingsError

ROWS = [{"question": f"{number}?", "answer": f"{number}."} for number in range(7)]


def write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(uri: object) -> list[Row]:
    return list(open_source(str(uri), Path("unused")).rows(lambda: None))


def source_versions(uri: object) -> list[SourceVersion]:
    return open_source(str(uri), Path("unused")).versions()


def columns(uri: object) -> list[object]:
    return [row.columns for row in read_rows(uri)]


def test_the_same_rows_come_from_every_format(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "rows.jsonl", ROWS)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(ROWS, indent=2))
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=3)
    misnamed = write_lines(tmp_path / "lines.json", ROWS)
    for path in (lines, array, table, misnamed):
        assert columns(path) == ROWS, path


def test_a_uri_a_path_a_folder_and_a_glob_name_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "my rows"
    write_lines(folder / "b.jsonl", ROWS[4:])
    write_lines(folder / "a.jsonl", ROWS[:2])
    write_lines(folder / "a" / "x.jsonl", ROWS[2:4])
    (folder / "dataset_info.json").write_text("{}")
    (folder / "_SUCCESS").touch()
    (folder / ".hidden.jsonl").write_text("{}")
    expected = [*ROWS[:2], *ROWS[2:4], *ROWS[4:]]
    by_name = sorted(["a.jsonl", "a/x.jsonl", "b.jsonl"])
    assert [version.name for version in source_versions(folder)] == by_name
    for uri in (folder, f"file://{folder}", f"file://localhost{str(folder).replace(' ', '%20')}"):
        assert sorted(map(str, columns(uri))) == sorted(map(str, expected))
    assert columns(f"{folder}/**/*.jsonl") != []
    assert columns(f"{folder}/?.jsonl") == [*ROWS[:2], *ROWS[4:]]


def test_a_line_that_is_no_row_is_counted_by_its_problem(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    long = b'{"text": "' + b"x" * (2 * LINE_LIMIT_BYTES) + b'"}'
    nested = b"[" * 100_000
    number = b'{"a": ' + b"9" * 5000 + b"}"
    parts = [
        b"\xef\xbb\xbf{}",
        b"",
        b"[1]",
        b"{oops",
        b'{"a": "\xff"}',
        long,
        nested,
        number,
        b"{}",
    ]
    path.write_bytes(b"\n".join(parts))
    assert [(row.place, row.problem) for row in read_rows(path)] == [
        ("rows.jsonl:1", ""),
        ("rows.jsonl:3", "not a JSON object"),
        ("rows.jsonl:4", "not JSON"),
        ("rows.jsonl:5", "not UTF-8"),
        ("rows.jsonl:6", "line over 1 MB"),
        ("rows.jsonl:7", "not JSON"),
        ("rows.jsonl:8", "not JSON"),
        ("rows.jsonl:9", ""),
    ]


def test_a_parquet_value_that_python_cannot_hold_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    broken = pa.array([b"fine", b"\xff", b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": broken}), path)
    assert [row.problem for row in read_rows(path)] == ["", "not readable", ""]


def _junk(path: Path) -> Path:
    path.write_bytes(bytes(range(128, 256)) * 10)
    return path


def _half_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def _empty(path: Path) -> Path:
    path.touch()
    return path


def _empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


def _link_to_itself(path: Path) -> Path:
    path.symlink_to(path)
    return path


def _mixed_folder(path: Path) -> Path:
    write_lines(path / "a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), path / "b.parquet")
    return path


def _broken_array(path: Path) -> Path:
    path.write_text('[{"a": 1},')
    return path


def test_an_empty_volume_says_that_the_rows_are_to_be_copied_first(tmp_path: Path) -> None:
    """The first minutes on a cluster: the Job was applied before the rows were on the volume."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "nothing").mkdir()
    empty = f"{tmp_path / 'nothing'} is empty: copy the rows there first"
    for path in ("nothing/rows.jsonl", "nothing/team/rows.jsonl", "nothing/*.jsonl"):
        with pytest.raises(DataError, match=re.escape(empty)):
            read_rows(tmp_path / path)
    with pytest.raises(DataError, match="it is empty: copy the rows there first"):
        read_rows(tmp_path / "nothing")
    (tmp_path / "nothing").rmdir()
    with pytest.raises(DataError, match=f"{tmp_path} is empty: copy"):  # lost+found is the disk's
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "row.jsonl").write_text("{}")
    with pytest.raises(DataError, match=f"does not exist .in {tmp_path}: row.jsonl.: give"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "does not exist"),
        (lambda path: path / "*.jsonl", "matches no file"),
        (_empty, "is empty"),
        (_empty_folder, "holds no .jsonl"),
        (_junk, "holds neither JSON, CSV, Parquet nor Arrow"),
        (_half_parquet, "is damaged Parquet"),
        (_link_to_itself, "cannot be read|does not exist"),
        (_mixed_folder, "holds both JSONL and Parquet files"),
        (_broken_array, "is not valid JSON"),
        (lambda path: Path("/dev/null"), "is neither a file nor a folder"),
    ],
)
def test_a_file_that_is_no_rows_is_one_clear_line(tmp_path: Path, make: object, words: str) -> None:
    path = make(tmp_path / "rows")
    with pytest.raises(DataError, match=words) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.startswith(f"JOB_DATASET_URI: {path} ")
    assert "\n" not in message
    assert (
        ": give " in message or ": write " in message or ": unpack " in message or "glob" in message
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_one_clear_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(DataError, match="may not be read: give this process read permission"):
        read_rows(path)


@pytest.mark.parametrize("uri", ["hdfs://x:secret@y/z", "", "file://rows", "\0"])
def test_an_unsupported_uri_names_the_setting_and_what_is_supported(uri: str) -> None:
    with pytest.raises(SettingsError, match="JOB_DATASET_URI") as caught:
        read_rows(uri)
    assert "secret" not in str(caught.value)


def test_versions_are_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    here = write_lines(tmp_path / "here" / "rows.jsonl", ROWS)
    there = write_lines(tmp_path / "there" / "rows.jsonl", ROWS)
    assert source_versions(here) == source_versions(there)
    assert source_versions(here.parent) == source_versions(f"file://{there}")
    there.write_text(there.read_text().replace("3?", "4?"))
    assert source_versions(here) != source_versions(there)
