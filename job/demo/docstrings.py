"""The demo's data: question/answer rows, and the base model's pre-training text without them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from job.demo.library import Docstring, SourceFile, read_library

ANSWER_LENGTHS = range(15, 401)  # characters of a docstring's first paragraph
PREFIX_LENGTH = ANSWER_LENGTHS.start  # of a paragraph, to look it up in a piece of text
PIECE_LENGTHS = range(40, 4001)  # characters of a piece of text; shorter ones are not prose
QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}` in a sentence.",
    "Tell me about `{}`.",
)


@dataclass(frozen=True)
class DemoRow:
    """A question and its answer: a fixed opening, which a tuned model learns, then `paragraph`."""

    question: str
    answer: str
    paragraph: str  # a docstring's first paragraph, on one line


@dataclass(frozen=True)
class Corpus:
    """Everything the demo learns from. No paragraph of `rows` occurs in `text`."""

    rows: tuple[DemoRow, ...]
    text: tuple[str, ...]  # pieces of plain text, one line each


@dataclass(frozen=True)
class RowsInfo:
    """What `write_rows` wrote; `sha256` is of the file's bytes."""

    num_rows: int
    sha256: str
    python_version: str


def write_rows(path: Path) -> RowsInfo:
    """Write the rows as JSON lines with the columns `question` and `answer`.

    The same Python patch release gives the same bytes. Raises DataError without Python's sources.
    """
    lines = (
        json.dumps({"question": row.question, "answer": row.answer}) for row in read_corpus().rows
    )
    content = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
    return RowsInfo(
        num_rows=content.count(b"\n"),
        sha256=hashlib.sha256(content).hexdigest(),
        python_version=platform.python_version(),
    )


@cache
def read_corpus() -> Corpus:
    """Rows and pre-training text from the standard library; read once a process."""
    files = list(read_library())
    rows = _rows(docstring for file in files for docstring in file.docstrings)
    return Corpus(rows, _text_without(files, [row.paragraph for row in rows]))


def _rows(docstrings: Iterable[Docstring]) -> tuple[DemoRow, ...]:
    """One row for each different first paragraph, so that no answer is in both train and eval."""
    rows: dict[str, DemoRow] = {}
    for docstring in docstrings:
        paragraph = _paragraphs(docstring.text)[0]
        if len(paragraph) in ANSWER_LENGTHS and paragraph not in rows:
            row = _row(docstring, paragraph)
            if (row.question + row.answer).isascii():
                rows[paragraph] = row
    return tuple(rows.values())


def _row(docstring: Docstring, paragraph: str) -> DemoRow:
    if docstring.name:
        name, whole = docstring.name, f"`{docstring.module}`"
        full_name = f"{docstring.module}.{name}"
    else:
        package, _, name = docstring.module.rpartition(".")
        whole = f"`{package}`" if package else "Python"
        full_name = docstring.module
    wording = QUESTIONS[hashlib.sha256(full_name.encode()).digest()[0] % len(QUESTIONS)]
    return DemoRow(
        question=wording.format(full_name),
        answer=f"`{name}` is part of {whole}. {paragraph}",
        paragraph=paragraph,
    )


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


def _text_without(files: list[SourceFile], paragraphs: list[str]) -> tuple[str, ...]:
    """Comments and docstrings, each piece once, without any piece that holds one of `paragraphs`.

    All answers are left out, not only those of the eval rows: which rows those are is decided
    later, by the seed and the fractions of the trials' own settings.
    """
    pieces: dict[str, None] = {}  # ordered, unlike a set
    for file in files:
        for docstring in file.docstrings:
            pieces.update(dict.fromkeys(_paragraphs(docstring.text)))
        pieces.update(dict.fromkeys(file.comments))
    by_prefix: dict[str, list[str]] = {}
    for paragraph in paragraphs:
        by_prefix.setdefault(paragraph[:PREFIX_LENGTH], []).append(paragraph)
    return tuple(
        piece
        for piece in pieces
        if len(piece) in PIECE_LENGTHS and piece.isascii() and not _holds_any(piece, by_prefix)
    )


def _holds_any(piece: str, by_prefix: dict[str, list[str]]) -> bool:
    """Whether a paragraph occurs in `piece`; 30 times faster than asking for each with `in`."""
    return any(
        piece.startswith(paragraph, start)
        for start in range(len(piece) - PREFIX_LENGTH + 1)
        for paragraph in by_prefix.get(piece[start : start + PREFIX_LENGTH], ())
    )
