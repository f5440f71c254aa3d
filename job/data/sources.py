"""Where rows come from: local files of JSON lines, JSON arrays or Parquet, read as a stream."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from job.errors import DataError, SettingsError

SUPPORTED = "a path or file:// URI of one file, a glob or a folder of .jsonl, .json or .parquet"
LINE_LIMIT_BYTES = 2**20  # a longer line is not a row of text
ARRAY_LIMIT_BYTES = 2**29  # a JSON array is parsed in memory; JSON lines are not
_BATCH_ROWS = 1000
_LINES = (".jsonl", ".ndjson")
_KINDS = {".jsonl": "JSONL", ".ndjson": "JSONL", ".parquet": "Parquet", ".json": "JSON"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


class Row(NamedTuple):
    """One row; `problem` says why it could not be read, and then it has no columns."""

    place: str  # "shard-0.jsonl:12": file and line (Parquet and arrays: row), from 1
    columns: Mapping[str, Any]
    problem: str = ""


class SourceVersion(NamedTuple):
    """What identifies a file of rows on every machine."""

    name: str  # relative to the folder that was named
    size_bytes: int
    sha256: str


class _Shard(NamedTuple):
    name: str
    path: Path


def read_rows(uri: str) -> Iterator[Row]:
    """Every row of the data set, shards in the order of their names.

    A line that is no row is yielded with its `problem`. Raises `SettingsError` for a scheme that
    is not supported and `DataError` where a file as a whole cannot be read.
    """
    for shard in _find_shards(uri):
        with _explained(shard.path):
            yield from _reader(shard)(shard)


def source_versions(uri: str) -> list[SourceVersion]:
    """Names, sizes and content hashes of the shards, in the order of their names."""
    versions = []
    for shard in _find_shards(uri):
        with _explained(shard.path), shard.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            versions.append(SourceVersion(shard.name, file.tell(), sha256))
    return versions


def _find_shards(uri: str) -> list[_Shard]:
    path = _local_path(uri)
    with _explained(path):
        if path.is_dir():
            shards = _folder_shards(path)
        elif path.is_file():
            shards = [_Shard(path.name, path)]
        elif _is_glob(path):
            shards = _glob_shards(path)
        elif path.exists():
            raise _unusable(path, "is neither a file nor a folder", f"give {SUPPORTED}")
        else:
            raise _unusable(path, "does not exist", f"give {SUPPORTED}")
        if not any(shard.path.stat().st_size for shard in shards):
            raise _unusable(path, "is empty", "give a file with one row a line")
    return sorted(shards)


def _local_path(uri: str) -> Path:
    scheme, separator, rest = uri.partition("://")
    if not uri or "\0" in uri:
        raise SettingsError(f"JOB_DATASET_URI is not a path: give {SUPPORTED}")
    if not separator:
        return Path(uri)
    if scheme.lower() != "file":  # only the scheme is shown: the rest may hold a password
        raise SettingsError(f"JOB_DATASET_URI: {scheme}:// is not supported: give {SUPPORTED}")
    absolute = rest.removeprefix("localhost")
    if not absolute.startswith("/"):
        raise SettingsError(f"JOB_DATASET_URI {uri}: file:// takes an absolute path: file:///...")
    return Path(unquote(absolute))


def _folder_shards(folder: Path) -> list[_Shard]:
    """The folder's files of one kind, in every depth; hidden files and `_SUCCESS` are no rows."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out an unreadable sub-folder without a word

    found: dict[str, list[_Shard]] = {}
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            path = Path(parent, name)
            kind = _KINDS.get(path.suffix.lower())
            if kind and not name.startswith((".", "_")):
                shard = _Shard(path.relative_to(folder).as_posix(), path)
                found.setdefault(kind, []).append(shard)
    if len(found) > 1:
        found.pop("JSON", None)  # dataset_info.json and the like, beside the rows
    if len(found) > 1:
        kinds = " and ".join(sorted(found))
        raise _unusable(folder, f"holds both {kinds} files", "name one kind with a glob")
    if not found:
        raise _unusable(folder, "holds no .jsonl, .json or .parquet file", f"give {SUPPORTED}")
    return next(iter(found.values()))


def _glob_shards(pattern: Path) -> list[_Shard]:
    root = next(parent for parent in pattern.parents if not _is_glob(parent))
    paths = (path for path in root.glob(str(pattern.relative_to(root))) if path.is_file())
    shards = [_Shard(path.relative_to(root).as_posix(), path) for path in paths]
    if not shards:
        raise _unusable(pattern, "matches no file", f"give {SUPPORTED}")
    return shards


def _is_glob(path: Path) -> bool:
    return any(character in str(path) for character in "*?[")


def _reader(shard: _Shard) -> Callable[[_Shard], Iterator[Row]]:
    """Content decides, because many `.json` files hold JSON lines; the name decides the rest."""
    with shard.path.open("rb") as file:
        head = file.read(4096)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise _unusable(
                shard.path, f"is compressed ({kind})", f"unpack it and give {SUPPORTED}"
            )
    if head.startswith(b"PAR1"):
        return _read_parquet
    if shard.path.suffix.lower() in _LINES or start in (b"{", b""):
        return _read_lines
    if start == b"[":
        return _read_array
    raise _unusable(shard.path, "holds neither JSON nor Parquet", f"give {SUPPORTED}")


def _read_lines(shard: _Shard) -> Iterator[Row]:
    with shard.path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT_BYTES + 1):
            number += 1
            place = f"{shard.name}:{number}"
            if len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield Row(place, {}, "line over 1 MB")
            elif number == 1 and line.startswith(b"\xef\xbb\xbf"):
                yield from _parse_line(place, line[3:])
            else:
                yield from _parse_line(place, line)


def _skip_line(file: BinaryIO) -> None:
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
        yield _row(place, value)


def _row(place: str, value: object) -> Row:
    return Row(place, value) if isinstance(value, dict) else Row(place, {}, "not a JSON object")


def _read_array(shard: _Shard) -> Iterator[Row]:
    way_out = "write one JSON object a line (.jsonl)"
    if shard.path.stat().st_size > ARRAY_LIMIT_BYTES:
        raise _unusable(shard.path, "is a JSON array over 512 MB", way_out)
    try:
        values = json.loads(shard.path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _unusable(shard.path, "is not valid JSON", way_out) from error
    for number, value in enumerate(values, start=1):
        yield _row(f"{shard.name}:{number}", value)


def _read_parquet(shard: _Shard) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(shard.path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for columns in _batch_rows(batch):
                    number += 1
                    place = f"{shard.name}:{number}"
                    yield Row(place, columns or {}, "" if columns is not None else "not readable")
    except pa.ArrowException as error:
        raise _unusable(shard.path, "is damaged Parquet", "write it again") from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of a record batch; None for one whose values Python cannot hold (bad UTF-8, dates)."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        if len(batch) == 1:
            yield None
            return
        for index in range(len(batch)):
            yield from _batch_rows(batch.slice(index, 1))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise _unusable(path, "may not be read", "give this process read permission") from error
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise _unusable(path, reason, f"give {SUPPORTED}") from error


def _unusable(path: Path, what: str, way_out: str) -> DataError:
    return DataError(f"JOB_DATASET_URI: {path} {what}: {way_out}")
