"""Reads docstrings and comments from the sources of Python's own standard library.

They are on every machine that runs Python, so the demo needs no network. They differ between Python
patch releases; within one release the order and the content are fixed.
"""

from __future__ import annotations

import ast
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


@dataclass(frozen=True)
class Docstring:
    """One docstring, its indentation removed; `name` is empty for that of the module itself."""

    module: str  # dotted, as in `email.message`
    name: str  # as in `Message.get_all`
    text: str


@dataclass(frozen=True)
class SourceFile:
    """What people wrote for people in one source file."""

    docstrings: tuple[Docstring, ...]
    comments: tuple[str, ...]  # blocks of whole-line comments, one line each


def read_library() -> Iterator[SourceFile]:
    """Read every module in the order of its path; about 3 CPU seconds.

    Raises DataError where Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(PurePosixPath(path.relative_to(root)) for path in root.rglob("*.py"))
    paths = [path for path in paths if not _is_skipped(path)]
    if len(paths) < 100:  # a complete library has about 390
        raise DataError(
            f"{root} holds {len(paths)} Python source files, the demo needs the whole standard "
            "library: use a Python that is installed with its sources"
        )
    for path in paths:
        source = (root / path).read_text(encoding="utf-8", errors="replace")
        yield SourceFile(_docstrings(source, _module_name(path)), tuple(_comments(source)))


def _is_skipped(path: PurePosixPath) -> bool:
    return bool(SKIPPED_NAMES.intersection(path.parts)) or path.name.startswith("_sysconfigdata")


def _module_name(path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(source: str, module: str) -> tuple[Docstring, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library are not ours to report
        tree = ast.parse(source)
    found = [("", tree), *_definitions(tree.body, "")]
    texts = ((name, ast.get_docstring(node)) for name, node in found)
    return tuple(Docstring(module, name, text) for name, text in texts if text)


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


def _comments(source: str) -> Iterator[str]:
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.strip("#-= "))
        elif block:
            yield " ".join(" ".join(block).split())
            block = []
