"""Prepared tables as Parquet files, and the manifest that says which files belong together."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from job.data.samples import SampleTable
from job.errors import work_dir_error

SCHEMA_VERSION = 1  # raise it when the same settings would give other rows, tokens or files
SIDES = ("train", "eval")
_COLUMNS = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("is_target", pa.list_(pa.bool_()))],
)
_ROW_GROUP_SAMPLES = 5000
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Counts:
    """What became of the rows: rows_read = unusable + not selected + duplicates + selected."""

    rows_read: int
    unusable: dict[str, int]  # reason -> rows
    duplicates: int  # of a selected row; left out
    selected: int  # = train + eval + too_long + rows that the template or tokenizer refused
    refused: dict[str, int]  # reason -> selected rows without a sample, too_long apart
    too_long: int  # no target within max_seq_length
    truncated: int  # the end of the last answer cut off; these rows are used
    context_answers: int  # answers that the template does not let us learn
    train: int
    eval: int


@dataclass(frozen=True)
class TableFile:
    """One side's file. `content_sha256` is that of the table, whoever wrote the file."""

    name: str
    sha256: str
    content_sha256: str

    @classmethod
    def describe(cls, side: str, table: SampleTable, path: Path) -> TableFile:
        """The description of a file that was just written."""
        sha256 = file_sha256(path)
        return cls(f"{side}-{sha256}.parquet", sha256, content_sha256(table))


@dataclass(frozen=True)
class Manifest:
    """The done-marker of prepared data."""

    digest: str
    train: TableFile
    eval: TableFile
    counts: Counts

    def to_bytes(self) -> bytes:
        """JSON with a fresh nonce, so that the store can tell our write from another's."""
        document = {"schema": SCHEMA_VERSION, **asdict(self), "nonce": uuid4().hex}
        return json.dumps(document, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, digest: str) -> Manifest:
        """Raises `ValueError` for anything that `to_bytes` did not write for this digest."""
        try:
            document = json.loads(data)
            if (document["schema"], document["digest"]) != (SCHEMA_VERSION, digest):
                raise ValueError("the manifest is of other data")
            files = {side: _table_file(side, document[side]) for side in SIDES}
            return cls(digest, **files, counts=Counts(**document["counts"]))
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error


def _table_file(side: str, document: dict[str, Any]) -> TableFile:
    file = TableFile(**document)
    if not _SHA256.fullmatch(file.sha256) or not _SHA256.fullmatch(file.content_sha256):
        raise ValueError("not a sha256")
    if file.name != f"{side}-{file.sha256}.parquet":
        raise ValueError("a file's name is not its hash")
    return file


def write_table(table: SampleTable, path: Path) -> None:
    """One row a sample. Raises `OutageError` if the disk is full."""
    assert len(table.input_ids) < 2**31, "list offsets are int32"
    offsets = pa.array(table.offsets, type=pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values))
        for values in (table.input_ids, table.is_target)
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = pa.Table.from_arrays(lists, schema=_COLUMNS)
        # The writer holds a row group in memory: 1.1 GB for 180,000 samples in one.
        pq.write_table(whole, path, compression="zstd", row_group_size=_ROW_GROUP_SAMPLES)
    except OSError as error:
        raise work_dir_error(path, error) from error


def read_table(path: Path) -> SampleTable:
    """The inverse of `write_table`; check the file's sha256 before."""
    lists = [column.combine_chunks() for column in pq.read_table(path, schema=_COLUMNS).columns]
    input_ids, is_target = (column.flatten().to_numpy(zero_copy_only=False) for column in lists)
    lengths = lists[0].value_lengths().to_numpy()
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return SampleTable(input_ids.astype(np.int32), is_target.astype(np.bool_), offsets)


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(table: SampleTable) -> str:
    """Of the table itself: equal for equal samples, whatever Parquet writer stored them."""
    content = hashlib.sha256()
    for array, dtype in (
        (table.offsets, "<i8"),
        (table.input_ids, "<i4"),
        (table.is_target, "|b1"),
    ):
        content.update(np.ascontiguousarray(array, dtype=dtype).data)
    return content.hexdigest()
