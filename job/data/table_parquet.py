"""Sample tables as Parquet files, written and read row group by row group.

Memory never holds a whole table: 180,000 samples of 400 tokens are 360 MB. A table is read back
into a nameless file, which is mapped, so that the system keeps in memory what training looks at.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from job.data.samples import SampleTable
from job.data.tokens import Sample
from job.errors import work_dir_error

_COLUMNS = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("is_target", pa.list_(pa.bool_()))],
)
# Writing a row group costs several times its size: 1.1 GB for 180,000 samples in one, 25 MB for
# these (of 400 tokens each).
_ROW_GROUP_SAMPLES = 1000


class TableWriter:
    """A table's file in the making; every method raises `OutageError` for a full disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lengths: list[int] = []  # tokens of each sample
        self._group: list[Sample] = []
        with self._translated():
            self._writer = pq.ParquetWriter(path, _COLUMNS, compression="zstd")

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        assert len(sample.input_ids) == len(sample.is_target)
        assert not sample.is_target[0], "a first token cannot be predicted"
        self.lengths.append(len(sample.input_ids))
        self._group.append(sample)
        if len(self._group) == _ROW_GROUP_SAMPLES:
            self._write_group()

    def close(self) -> None:
        """Write what is left; the file is whole then."""
        self._write_group()
        with self._translated():
            self._writer.close()

    def discard(self) -> None:
        """Remove the file, if it is still there under its name, whole or not."""
        with suppress(OSError):
            self._writer.close()
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise work_dir_error(self.path, error) from error

    def _write_group(self) -> None:
        if not self._group:
            return
        offsets = _offsets([len(sample.input_ids) for sample in self._group], np.int32)
        input_ids = np.concatenate([sample.input_ids for sample in self._group])
        is_target = np.concatenate([sample.is_target for sample in self._group])
        bits = np.packbits(is_target, bitorder="little")
        starts = _arrow(pa.int32(), offsets, len(offsets))
        columns = [
            pa.ListArray.from_arrays(starts, _arrow(pa.int32(), input_ids, len(input_ids))),
            pa.ListArray.from_arrays(starts, _arrow(pa.bool_(), bits, len(is_target))),
        ]
        self._group.clear()
        with self._translated():
            self._writer.write_table(pa.Table.from_arrays(columns, schema=_COLUMNS))


def read_table(path: Path) -> SampleTable:
    """Read the table of a file whose sha256 was checked. Raises `OutageError` for a full disk."""
    lengths: list[int] = []
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            for column in _COLUMNS.names:
                for lists in _groups(path, column):
                    file.write(_values(lists).data)
                    if column == "input_ids":
                        lengths += lists.value_lengths().to_pylist()
            file.flush()
            num_tokens = sum(lengths)
            # Mapping nothing is an error. The mapping outlives the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if num_tokens else b""
    except OSError as error:
        raise work_dir_error(path.parent, error) from error
    return SampleTable(
        np.frombuffer(mapped, dtype=np.int32, count=num_tokens),
        np.frombuffer(mapped, dtype=np.bool_, offset=4 * num_tokens, count=num_tokens),
        _offsets(lengths, np.int64),
    )


def content_sha256(lengths: list[int], path: Path) -> str:
    """The sha256 of the table in a file, whose samples have these numbers of tokens.

    It is equal for equal samples, whatever Parquet writer stored them.
    """
    content = hashlib.sha256(_offsets(lengths, "<i8").data)
    for column in _COLUMNS.names:
        for lists in _groups(path, column):
            content.update(_values(lists).data)
    return content.hexdigest()


def _arrow(kind: Any, values: NDArray[Any], length: int) -> Any:
    """An array's own memory as Arrow's; `pa.array` and `to_numpy` would import pandas, 45 MB."""
    return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(values)])


def _values(lists: Any) -> NDArray[Any]:
    """The values of list arrays, (tokens,): `<i4`, or one byte a bool."""
    flat = lists.flatten()
    end = flat.offset + len(flat)
    buffer = flat.buffers()[1]
    if not len(flat):
        return np.empty(0, dtype=np.int32)
    if flat.type == pa.int32():
        return np.frombuffer(buffer, dtype="<i4", count=end)[flat.offset :]
    bits = np.frombuffer(buffer, dtype=np.uint8)
    return np.unpackbits(bits, count=end, bitorder="little")[flat.offset :]


def _offsets(lengths: list[int], dtype: Any) -> NDArray[Any]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(dtype)


def _groups(path: Path, column: str) -> Iterator[Any]:
    """A column's list arrays, one a row group at most."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROW_GROUP_SAMPLES, columns=[column], use_threads=False):
            yield batch.column(0)
