"""The manifest of prepared data: which files belong together, and what became of the rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from job.data.table_parquet import content_sha256
from job.store.base import file_sha256

SCHEMA_VERSION = 1  # raise it when the same settings would give other rows, tokens or files
SIDES = ("train", "eval")
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
    """The file of one side; `content_sha256` is that of the table in it, whoever wrote the file."""

    name: str
    sha256: str
    content_sha256: str

    @classmethod
    def describe(cls, side: str, lengths: list[int], path: Path) -> TableFile:
        """The description of a file that was just written, of samples of these lengths."""
        sha256 = file_sha256(path)
        return cls(f"{side}-{sha256}.parquet", sha256, content_sha256(lengths, path))


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
        """Read a manifest; `ValueError` for what `to_bytes` did not write for this digest."""
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
