"""From rows to the two sample tables: read, choose, order, render, tokenise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from job.data.formats import (
    Columns,
    Message,
    UnusableRowError,
    UnusableRows,
    listing,
    row_messages,
)
from job.data.samples import SampleTable
from job.data.sampling import is_eval, is_selected, row_hash
from job.data.sources import read_rows
from job.data.table_files import Counts
from job.data.templates import ChatTemplate, Rendered
from job.data.tokens import TOO_LONG, Sample, encode
from job.errors import DataError
from job.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Between two looks at should_stop: about a second of work, of the 15 that a spot machine gives.
_BATCH_ROWS = 500
_BATCH_CHARACTERS = 2_000_000
_COLUMN_NAMES_LIMIT = 1000


@dataclass(frozen=True)
class DataSettings:
    """Everything of the job's settings that decides which tokens a trial sees."""

    dataset_uri: str
    prompt_column: str | None
    completion_column: str | None
    chat_template: str | None  # Jinja, or the path of a file of it
    max_seq_length: int  # tokens
    seed: int
    subsample_fraction: float  # in (0, 1]; 1 takes every row
    eval_fraction: float  # of the subsample, in (0, 1)

    @property
    def columns(self) -> Columns | None:
        """The columns that the user named."""
        if self.prompt_column is None or self.completion_column is None:
            assert self.prompt_column == self.completion_column, "settings take both or none"
            return None
        return Columns(self.prompt_column, self.completion_column)


class SelectedRow(NamedTuple):
    """A row of the subsample; sorting these gives the order of the tables."""

    row_hash: bytes
    messages: tuple[Message, ...]
    place: str


@dataclass
class _Selection:
    rows: list[SelectedRow]
    unusable: UnusableRows
    num_rows: int
    num_duplicates: int


@dataclass
class _Side:
    """One table in the making."""

    samples: list[Sample] = field(default_factory=list)
    too_long: int = 0
    context_answers: int = 0

    def table(self) -> SampleTable:
        return SampleTable.concatenate(
            [sample.input_ids for sample in self.samples],
            [sample.is_target for sample in self.samples],
        )


def build_tables(
    settings: DataSettings,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    should_stop: Callable[[], None],
) -> tuple[SampleTable, SampleTable, Counts]:
    """The train and the eval table, both in the order of the rows' hashes.

    Raises `DataError` if no row can be used for one of the sides or more than 5 % for none.
    """
    selection = _select(settings, should_stop)
    log.info("data: %d rows read, %d selected", selection.num_rows, len(selection.rows))
    train, held_out = _Side(), _Side()
    refused = UnusableRows()
    for batch in _batches(selection.rows):
        should_stop()
        for row, rendered, sample in _encode_rows(batch, tokenizer, template, settings, refused):
            side = held_out if is_eval(row.row_hash, fraction=settings.eval_fraction) else train
            if sample == TOO_LONG:
                side.too_long += 1
            elif isinstance(sample, str):
                refused.add(sample, row.place)
            else:
                side.samples.append(sample)
                side.context_answers += rendered.num_context_answers
    refused.check_share(len(selection.rows), way_out="give another JOB_CHAT_TEMPLATE")
    counts = _counts(selection, refused, train, held_out)
    _check_sides(counts, settings)
    _warn(counts, settings)
    return train.table(), held_out.table(), counts


def _select(settings: DataSettings, should_stop: Callable[[], None]) -> _Selection:
    """The subsample without its duplicates, in the order of the row hashes."""
    unusable = UnusableRows()
    columns_seen: set[str] = set()
    selected: dict[bytes, SelectedRow] = {}
    num_rows = num_duplicates = 0
    for num_rows, row in enumerate(read_rows(settings.dataset_uri), start=1):
        if num_rows % _BATCH_ROWS == 0:
            should_stop()
        if row.problem:
            unusable.add(row.problem, row.place)
            continue
        if len(columns_seen) < _COLUMN_NAMES_LIMIT:
            columns_seen.update(row.columns)
        columns_seen.update(name for name in settings.columns or () if name in row.columns)
        try:
            messages = row_messages(row.columns, settings.columns)
        except UnusableRowError as unusable_row:
            unusable.add(str(unusable_row), row.place)
            continue
        row_key = row_hash(messages, seed=settings.seed)
        if not is_selected(row_key, fraction=settings.subsample_fraction):
            continue
        if row_key in selected:
            num_duplicates += 1
        else:
            selected[row_key] = SelectedRow(row_key, messages, row.place)
    if num_rows == 0:
        raise DataError("JOB_DATASET_URI: no rows in these files: give files with one row a line")
    unusable.check_columns(columns_seen, settings.columns)
    unusable.check_share(
        num_rows,
        way_out="name the columns with JOB_PROMPT_COLUMN and JOB_COMPLETION_COLUMN "
        f"(present: {listing(sorted(columns_seen))})",
    )
    return _Selection(sorted(selected.values()), unusable, num_rows, num_duplicates)


def _batches(rows: list[SelectedRow]) -> Iterator[list[SelectedRow]]:
    batch: list[SelectedRow] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += sum(len(message.content) for message in row.messages)
        if len(batch) == _BATCH_ROWS or num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode_rows(
    rows: list[SelectedRow],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    settings: DataSettings,
    refused: UnusableRows,
) -> Iterator[tuple[SelectedRow, Rendered, Sample | str]]:
    kept, texts = [], []
    for row in rows:
        try:
            texts.append(template.render(row.messages))
        except UnusableRowError as unusable_row:
            refused.add(str(unusable_row), row.place)
        else:
            kept.append(row)
    samples = encode(texts, tokenizer, max_seq_length=settings.max_seq_length)
    yield from zip(kept, texts, samples, strict=True)


def _counts(selection: _Selection, refused: UnusableRows, train: _Side, held_out: _Side) -> Counts:
    samples = train.samples + held_out.samples
    return Counts(
        rows_read=selection.num_rows,
        unusable=_by_frequency(selection.unusable.counts),
        duplicates=selection.num_duplicates,
        selected=len(selection.rows),
        refused=_by_frequency(refused.counts),
        too_long=train.too_long + held_out.too_long,
        truncated=sum(sample.truncated for sample in samples),
        context_answers=train.context_answers + held_out.context_answers,
        train=len(train.samples),
        eval=len(held_out.samples),
    )


def _by_frequency(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _check_sides(counts: Counts, settings: DataSettings) -> None:
    if counts.train and counts.eval:
        return
    side = "train" if not counts.train else "eval"
    way_out = "give more rows, or raise JOB_SUBSAMPLE_FRACTION"
    way_out += " or JOB_EVAL_FRACTION" if side == "eval" else " or lower JOB_EVAL_FRACTION"
    if counts.too_long:
        way_out += f", or raise JOB_MAX_SEQ_LENGTH ({settings.max_seq_length} tokens)"
    raise DataError(
        f"JOB_DATASET_URI: no {side} rows: {counts.rows_read} read, {counts.selected} selected by "
        f"JOB_SUBSAMPLE_FRACTION {settings.subsample_fraction:g}, {counts.too_long} of them too "
        f"long, JOB_EVAL_FRACTION {settings.eval_fraction:g}: {way_out}"
    )


def _warn(counts: Counts, settings: DataSettings) -> None:
    if counts.too_long or counts.truncated:
        log.warning(
            "data: of %d selected rows %d lost the end of their answer and %d were left out, "
            "because they are over JOB_MAX_SEQ_LENGTH %d",
            *(counts.selected, counts.truncated, counts.too_long, settings.max_seq_length),
        )
    if counts.context_answers:
        log.warning(
            "data: %d earlier answers are context only, because the chat template rewrites them",
            counts.context_answers,
        )
    for what, reasons in (("unusable", counts.unusable), ("refused", counts.refused)):
        if reasons:
            listing = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
            log.warning("data: %s rows: %s", what, listing)
