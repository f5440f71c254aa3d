"""From rows to the two sample tables: read, choose, order, render, tokenise."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.data.formats import Columns, UnusableRowError, UnusableRows
from job.data.rows import Source
from job.data.samples import SampleTable
from job.data.sampling import is_eval
from job.data.selection import CHECK_ROWS, Choice, SelectedRow, Selection
from job.data.table_files import Counts
from job.data.templates import ChatTemplate, Rendered
from job.data.tokens import TOO_LONG, Sample, encode
from job.errors import DataError
from job.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 2_000_000  # between two looks at should_stop, or CHECK_ROWS rows


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


@dataclass
class _Side:
    """One table in the making: tokens of all samples in two buffers, which become its arrays."""

    input_ids: array[int] = field(default_factory=lambda: array("i"))
    is_target: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    too_long: int = 0
    context_answers: int = 0

    def add(self, sample: Sample, rendered: Rendered) -> None:
        self.input_ids.frombytes(sample.input_ids.tobytes())
        self.is_target += sample.is_target.tobytes()
        self.lengths.append(len(sample.input_ids))
        self.truncated += sample.truncated
        self.context_answers += rendered.num_context_answers

    def table(self) -> SampleTable:
        assert self.input_ids.itemsize == 4
        return SampleTable(
            np.frombuffer(self.input_ids, dtype=np.int32),
            np.frombuffer(self.is_target, dtype=np.bool_),
            np.cumsum([0, *self.lengths], dtype=np.int64),
        )


def build_tables(
    settings: DataSettings,
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    work_dir: Path,
    should_stop: Callable[[], None],
) -> tuple[SampleTable, SampleTable, Counts]:
    """The train and the eval table, both in the order of the rows' hashes.

    `work_dir` holds the selected rows meanwhile. Raises `DataError` if no row can be used for one
    of the sides or more than 5 % for none.
    """
    train, held_out = _Side(), _Side()
    refused = UnusableRows()
    choice = Choice(settings.columns, settings.seed, settings.subsample_fraction)
    with Selection(choice, work_dir) as selection:
        selection.read(source, should_stop)
        log.info("data: %d rows read, %d selected", selection.num_rows, len(selection))
        for batch in _batches(selection.rows()):
            should_stop()
            encoded = _encode_rows(batch, tokenizer, template, settings, refused)
            for row, rendered, sample in encoded:
                side = held_out if is_eval(row.row_hash, fraction=settings.eval_fraction) else train
                if sample == TOO_LONG:
                    side.too_long += 1
                elif isinstance(sample, str):
                    refused.add(sample, row.place)
                else:
                    side.add(sample, rendered)
    refused.check_share(len(selection), way_out="give another JOB_CHAT_TEMPLATE")
    counts = _counts(selection, refused, train, held_out)
    _check_sides(counts, settings)
    _warn(counts, settings)
    return train.table(), held_out.table(), counts


def _batches(rows: Iterator[SelectedRow]) -> Iterator[list[SelectedRow]]:
    batch: list[SelectedRow] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += sum(len(message.content) for message in row.messages)
        if len(batch) == CHECK_ROWS or num_characters >= _BATCH_CHARACTERS:
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


def _counts(selection: Selection, refused: UnusableRows, train: _Side, held_out: _Side) -> Counts:
    return Counts(
        rows_read=selection.num_rows,
        unusable=_by_frequency(selection.unusable.counts),
        duplicates=selection.num_duplicates,
        selected=len(selection),
        refused=_by_frequency(refused.counts),
        too_long=train.too_long + held_out.too_long,
        truncated=train.truncated + held_out.truncated,
        context_answers=train.context_answers + held_out.context_answers,
        train=len(train.lengths),
        eval=len(held_out.lengths),
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
