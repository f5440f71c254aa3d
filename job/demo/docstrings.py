"""The demo's rows: questions about Python's standard library, answered by its own docstrings.

They are on every machine that runs Python, so the demo fetches no data, and whether an answer has
the rows' form is seen at a glance. They differ between Python patch releases; within one release
order and content are fixed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from job.errors import DataError

# Tests, and what a distribution of Python may leave out, move or add.
SKIPPED_NAMES = {"__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages"}
SKIPPED_NAMES |= {"lib-dynload", "distutils", "ensurepip", "lib2to3", "pydoc_data"}
SKIPPED_NAMES |= {"sitecustomize.py"}
SKIPPED_NAMES |= {"idlelib", "tkinter", "turtle.py", "turtledemo"}  # GUI: slim images lack them
SKIPPED_NAMES |= {"encodings"}  # tables, not prose
# Characters of a docstring's first paragraph: one sentence. A row of them has 65 tokens on average,
# a third of which the model's own system turn takes.
ANSWER_LENGTHS = range(15, 81)
QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}` in a sentence.",
    "Tell me about `{}`.",
)


@dataclass(frozen=True)
class DemoRow:
    """A question and its answer: a fixed opening, then a docstring's first paragraph."""

    question: str
    answer: str


def write_rows(path: Path) -> int:
    """Write the rows as JSON lines with the columns `question` and `answer`; return their number.

    The same Python patch release gives the same bytes. Raises DataError without Python's sources.
    """
    rows = read_rows()
    lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes("".join(line + "\n" for line in lines).encode())
    temporary.replace(path)
    return len(rows)


def read_rows() -> tuple[DemoRow, ...]:
    """Read the standard library, in the order of its paths; about 2 CPU seconds.

    There is one row for each different paragraph, so that no answer is in both train and eval.
    Raises DataError where Python was installed without its sources.
    """
    rows: dict[str, DemoRow] = {}
    for module, source in _sources():
        for name, text in _docstrings(source):
            paragraph = " ".join(text.strip().partition("\n\n")[0].split())
            is_public = not any(part.startswith("_") for part in f"{module}.{name}".split("."))
            if len(paragraph) in ANSWER_LENGTHS and is_public and paragraph not in rows:
                row = _row(module, name, paragraph)
                if (row.question + row.answer).isascii():
                    rows[paragraph] = row
    return tuple(rows.values())


def _row(module: str, name: str, paragraph: str) -> DemoRow:
    if name:
        whole, full_name = f"`{module}`", f"{module}.{name}"
    else:
        package, _, name = module.rpartition(".")
        whole, full_name = f"`{package}`" if package else "Python", module
    wording = QUESTIONS[hashlib.sha256(full_name.encode()).digest()[0] % len(QUESTIONS)]
    return DemoRow(wording.format(full_name), f"`{name}` is part of {whole}. {paragraph}")


def _sources() -> Iterator[tuple[str, str]]:
    """The dotted name and the source of every module."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(PurePosixPath(path.relative_to(root)) for path in root.rglob("*.py"))
    paths = [path for path in paths if not _is_skipped(path)]
    if len(paths) < 100:  # a complete library has about 390
        raise DataError(
            f"{root} holds {len(paths)} Python source files, the demo needs the whole standard "
            "library: use a Python that is installed with its sources"
        )
    for path in paths:
        yield _module_name(path), (root / path).read_text(encoding="utf-8", errors="replace")


def _is_skipped(path: PurePosixPath) -> bool:
    return bool(SKIPPED_NAMES.intersection(path.parts)) or path.name.startswith("_sysconfigdata")


def _module_name(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Names, as in `Message.get_all`, and docstrings; the module's own has no name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library are not ours to report
        tree = ast.parse(source)
    for name, node in [("", tree), *_definitions(tree.body, "")]:
        if text := ast.get_docstring(node):
            yield name, text


def _definitions(
    body: list[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Functions and classes with their qualified names; those inside functions are left out."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + node.name
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, name + ".")
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix)
