"""The manifest of prepared data: which files belong together, and what became of the rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from job.data.table_parquet import content_sha256
from job.data.unusable import some_of
from job.store.base import file_sha256

SCHEMA_VERSION = 2  # raise it when the same settings would give other rows, tokens or files
READABLE_SCHEMAS = (1, 2)  # 1: repeated rows were left out, and columns beside the format
SIDES = ("train", "eval")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Counts:
    """What became of the rows: rows_read = unusable + not selected + selected."""

    rows_read: int
    unusable: dict[str, int]  # reason -> rows
    duplicates: int  # selected rows that say what another one says (schema 1: left out)
    selected: int  # = train + eval + too_long + rows that the template or tokenizer refused
    refused: dict[str, int]  # reason -> selected rows without a sample, too_long apart
    too_long: int  # no target within max_seq_length
    truncated: int  # the end of the last answer cut off; these rows are used
    context_answers: int  # answers that the template does not let us learn
    train: int
    eval: int
    dropped_thoughts: int = 0  # answers learned without the reasoning that belongs to them
    prerendered: int = 0  # rows whose prompt held the template's own tokens already
    control_as_text: int = 0  # rows that spell control tokens, which are read as text
    joined: int = 0  # selected rows in which neighbouring turns of one role became one
    unanswered: int = 0  # selected rows whose turns after the last answer were left out
    columns_not_used: list[str] = field(default_factory=list)  # that say something in most rows
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> its first rows


def count_lines(counts: Counts) -> list[str]:
    """The counts as a small table, a line each; what did not happen is left out."""
    reasons = [
        (count, f"{what}: {reason} ({some_of(counts.places.get(reason, []), count)})")
        for what, group in (("unusable", counts.unusable), ("refused", counts.refused))
        for reason, count in group.items()
    ]
    lines = [
        (counts.selected, f"taken: {counts.train} to train on, {counts.eval} held out"),
        (counts.duplicates, "of these repeated: they say what another one says"),
        (counts.joined, "of these with neighbouring turns of one role, which were joined"),
        (counts.unanswered, "of these without their last turns, which nobody answered"),
        (counts.truncated, "of these cut: the end of the last answer is not learned"),
        (counts.too_long, "of these left out: no answer within JOB_MAX_SEQ_LENGTH"),
        (counts.context_answers, "earlier answers that are context only"),
        (counts.dropped_thoughts, "answers whose reasoning the chat template does not write"),
        (counts.prerendered, "rows taken as rendered: their prompts hold the template's tokens"),
        (counts.control_as_text, "rows that spell control tokens: they are read as text"),
        *reasons,
    ]
    shown = [(counts.rows_read, "rows read"), *(line for line in lines if line[0])]
    return [f"{count:>9,}  {what}" for count, what in shown]


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
            if document["schema"] not in READABLE_SCHEMAS or document["digest"] != digest:
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
