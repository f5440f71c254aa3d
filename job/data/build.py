"""Makes both sample tables of the rows: read, choose, order, render, tokenise, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING
from uuid import uuid4

from job.data.formats import Layout
from job.data.preview import bracketed, preview
from job.data.rows import Source
from job.data.sampling import is_eval
from job.data.selection import CHECK_ROWS, SelectedRow, Selection, SelectionRule
from job.data.table_files import SIDES, Counts, TableFile, count_lines
from job.data.table_parquet import TableWriter
from job.data.templates import ChatTemplate, Rendered
from job.data.tokens import TOO_LONG, Sample, encode
from job.data.unusable import UnusableRowError, UnusableRows, listing
from job.errors import DataError
from job.log import log
from job.progress import CountProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A batch ends here, or after CHECK_ROWS rows, and should_stop is asked between two of them. When it
# is tokenised, it holds 100 bytes of Python objects a character: 2 million took 30 MB more.
_BATCH_CHARACTERS = 300_000
SURELY_ON_BOTH_SIDES = 20  # rows expected on a side: of so many that differ, some fall there


@dataclass(frozen=True)
class DataSettings:
    """The settings that decide which tokens a trial sees."""

    dataset_uri: str
    prompt_column: str | None
    completion_column: str | None
    prompt_template: str | None  # column names in braces
    system_prompt: str | None  # of the rows that have none
    chat_template: str | None  # Jinja, or the path of a file of it
    max_seq_length: int  # tokens
    seed: int
    subsample_fraction: float  # in (0, 1]; 1 takes every row
    eval_fraction: float  # of the subsample, in (0, 1)

    @property
    def layout(self) -> Layout:
        """What the user said about the columns."""
        return Layout(
            self.prompt_column, self.completion_column, self.prompt_template, self.system_prompt
        )


class _Side:
    """One table in the making, and what became of its rows."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.table = TableWriter(folder / f"{name}.{uuid4().hex}")
        self.truncated = 0
        self.too_long = 0
        self.context_answers = 0
        self.dropped_thoughts = 0
        self.prerendered = 0
        self.control_as_text = 0
        self.first_sample: Sample | None = None

    def add(self, sample: Sample, rendered: Rendered) -> None:
        if self.first_sample is None:
            self.first_sample = sample
        self.table.add(sample)
        self.truncated += sample.truncated
        self.context_answers += rendered.num_context_answers
        self.dropped_thoughts += rendered.num_dropped_thoughts
        self.prerendered += rendered.is_prerendered
        self.control_as_text += rendered.control is not None

    def publish(self) -> TableFile:
        """Finish the file, and give it the name of its content."""
        self.table.close()
        file = TableFile.describe(self.name, self.table.lengths, self.table.path)
        self.table.path.replace(self.table.path.with_name(file.name))
        return file


def build_tables(
    settings: DataSettings,
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    work_dir: Path,
    should_stop: Callable[[], None],
) -> tuple[TableFile, TableFile, Counts]:
    """Write the train and the eval table to `work_dir`, both in the order of the rows' hashes.

    `work_dir` holds the selected rows meanwhile. Raises `DataError` if no row can be used for one
    of the sides or more than 5 % for none.
    """
    refused = UnusableRows()
    rule = SelectionRule(settings.layout, settings.seed, settings.subsample_fraction)
    with Selection(rule, work_dir) as selection, _sides(work_dir) as (train, held_out):
        selection.read(source, should_stop)
        log.info("data: %d rows read, %d selected", selection.num_rows, len(selection))
        with CountProgress("data: tokenising", "rows", total=len(selection)) as progress:
            for batch in _batches(selection.rows()):
                should_stop()
                for row, rendered, sample in _encode_rows(
                    batch, tokenizer, template, settings, refused
                ):
                    is_held_out = is_eval(row.row_hash, fraction=settings.eval_fraction)
                    side = held_out if is_held_out else train
                    if isinstance(sample, Sample):
                        side.add(sample, rendered)
                    elif sample == TOO_LONG:
                        side.too_long += 1
                    else:
                        refused.add(sample, row.place)
                progress.advance(len(batch))
        refused.check_share(len(selection), way_out="give another JOB_CHAT_TEMPLATE")
        counts = _counts(selection, refused, train, held_out)
        _check_sides(counts, settings)
        _tell(counts, settings)
        _show(train.first_sample, tokenizer)
        return train.publish(), held_out.publish(), counts


@contextmanager
def _sides(folder: Path) -> Iterator[tuple[_Side, _Side]]:
    """Both tables in the making; one that was not published is removed afterwards."""
    with ExitStack() as stack:
        sides = []
        for name in SIDES:
            sides.append(_Side(name, folder))
            stack.callback(sides[-1].table.discard)
        yield sides[0], sides[1]


def _batches(rows: Iterator[SelectedRow]) -> Iterator[list[SelectedRow]]:
    batch: list[SelectedRow] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += sum(len(m.content) + len(m.reasoning) for m in row.chat.messages)
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
            texts.append(template.render(row.chat))
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
        train=len(train.table.lengths),
        eval=len(held_out.table.lengths),
        dropped_thoughts=train.dropped_thoughts + held_out.dropped_thoughts,
        prerendered=train.prerendered + held_out.prerendered,
        control_as_text=train.control_as_text + held_out.control_as_text,
        joined=selection.num_joined,
        unanswered=selection.num_unanswered,
        columns_not_used=selection.columns_not_used,
        places=selection.unusable.places | refused.places,
    )


def _by_frequency(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _check_sides(counts: Counts, settings: DataSettings) -> None:
    if counts.train and counts.eval:
        return
    side, change = ("eval", "raise") if counts.train else ("train", "lower")
    share = settings.eval_fraction if side == "eval" else 1 - settings.eval_fraction
    way_outs = ["give more rows", f"{change} JOB_EVAL_FRACTION"]
    if settings.subsample_fraction < 1:
        way_outs.append("raise JOB_SUBSAMPLE_FRACTION")
    if counts.too_long:
        way_outs.append(f"raise JOB_MAX_SEQ_LENGTH ({settings.max_seq_length} tokens)")
    elif share * settings.subsample_fraction * counts.rows_read >= SURELY_ON_BOTH_SIDES:
        way_outs = ["give rows that differ: equal ones fall on one side, and all of these did"]
    way_out = ", or ".join(way_outs)
    raise DataError(
        f"JOB_DATASET_URI: no {side} rows: {counts.rows_read} read, {counts.selected} selected by "
        f"JOB_SUBSAMPLE_FRACTION {settings.subsample_fraction:g}, {counts.too_long} of them too "
        f"long, JOB_EVAL_FRACTION {settings.eval_fraction:g}: {way_out}"
    )


def _show(sample: Sample | None, tokenizer: PreTrainedTokenizerBase) -> None:
    assert sample is not None, "a side without rows has raised"
    text = bracketed(preview(sample.input_ids, sample.is_target, tokenizer))
    log.info("data: a sample, what is learned in [[ ]]:\n%s", indent(text, "  "))


def _tell(counts: Counts, settings: DataSettings) -> None:
    for line in count_lines(counts):
        log.info("data: %s", line)
    if counts.columns_not_used:
        log.warning(
            "data: columns not used: %s (JOB_PROMPT_TEMPLATE makes a prompt of several columns)",
            listing(counts.columns_not_used),
        )
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
    if counts.dropped_thoughts:
        log.warning(
            "data: %d answers are learned without their reasoning, which the chat template does not"
            " write: give another one with JOB_CHAT_TEMPLATE",
            counts.dropped_thoughts,
        )
    if counts.prerendered:
        log.warning(
            "data: %d prompts hold the chat template's own tokens and are taken as rendered",
            counts.prerendered,
        )
