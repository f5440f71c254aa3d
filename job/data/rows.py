"""What every source of rows gives: the rows with their places, and the files' versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from job.errors import DataError

SUPPORTED = (
    "a path, file://, s3://, gs:// or az:// URI of one file, a glob or a folder of .jsonl, .json, "
    ".csv, .parquet or .arrow, or a Hugging Face dataset (owner/name)"
)


class Row(NamedTuple):
    """One row; `problem` says why it could not be read, and then it has no columns."""

    place: str  # "shard-0.jsonl:12": file and line (Parquet and arrays: row), from 1
    columns: Mapping[str, Any]
    problem: str = ""


class SourceVersion(NamedTuple):
    """What identifies a file of rows on every machine."""

    name: str  # relative to the folder that was named
    size_bytes: int
    version: str  # local: sha256; bucket: the service's version tag; hub: commit


class Source(Protocol):
    """A data set whose files are listed, and of which nothing was read yet."""

    def versions(self) -> list[SourceVersion]:
        """Names, sizes and versions of the files, in the order of their names."""

    def rows(self, should_stop: Callable[[], None]) -> Iterator[Row]:
        """Every row, files in the order of their names.

        A line that is no row is yielded with its `problem`. `should_stop` is called before each
        file. Raises `DataError` where a file as a whole cannot be read, and what the bucket or
        the hub raises.
        """


def row_of(place: str, value: object) -> Row:
    """Make a row of a JSON value; one that is no object becomes a row with a problem."""
    return Row(place, value) if isinstance(value, dict) else Row(place, {}, "not a JSON object")


@contextmanager
def explained(where: object) -> Iterator[None]:
    """Turn a file's `OSError` into the one line that a person needs."""
    try:
        yield
    except PermissionError as error:
        raise unusable(where, "may not be read", "give this process read permission") from error
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise unusable(where, reason, f"give {SUPPORTED}") from error


def unusable(where: object, what: str, way_out: str) -> DataError:
    """Make the error for a file, folder or data set that cannot be used as a whole."""
    return DataError(f"JOB_DATASET_URI: {where} {what}: {way_out}")
