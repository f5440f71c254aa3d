"""The demo's rows, questions and sweep file, without torch: pytest tests/demo/test_docstrings.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import job.demo
from job.demo.docstrings import DemoRow, read_rows, write_rows
from job.errors import DataError


@pytest.fixture(scope="module")
def rows() -> tuple[DemoRow, ...]:
    """What this Python's own library gives; it takes 2 s to read."""
    return read_rows()


MODULE = '''"""Read files of rows, one after another.

Blank lines are passed over without a word to anybody."""

def read(path):
    """Return the rows of one file in their order."""

def _close():
    """Nobody outside asks for it, so nobody is told."""

class Reader:
    """Short."""
    if True:
        def close(self):
            """Return the rows of one file in their order."""
        def open(self):
            """Open the file, and say so in a sentence that is too long to be one of the rows,
            by a few characters."""
'''


def test_a_row_is_a_first_paragraph_of_one_sentence_about_a_public_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):  # fewer are taken for a Python without its sources
        (tmp_path / f"m{number:02d}.py").touch()
    (tmp_path / "package/test").mkdir(parents=True)
    (tmp_path / "package/__init__.py").write_text(MODULE)
    (tmp_path / "package/_private.py").write_text('"""Something inside, for the package alone."""')
    (tmp_path / "package/test/skipped.py").write_text('"""Tests are no part of a library."""')
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert [(row.question.split("`")[1], row.answer) for row in read_rows()] == [
        ("package", "`package` is part of Python. Read files of rows, one after another."),
        (
            "package.read",
            "`read` is part of `package`. Return the rows of one file in their order.",
        ),
    ]


@pytest.mark.slow
def test_library_gives_thousands_of_ascii_rows(rows: tuple[DemoRow, ...]) -> None:
    assert 2_500 < len(rows) < 4_500
    for row in rows:
        assert (row.question + row.answer).isascii()
        opening, _, paragraph = row.answer.partition(". ")
        assert opening.startswith("`")
        assert 15 <= len(paragraph) <= 80
        assert "\n" not in row.answer
        assert "._" not in row.question


@pytest.mark.slow
def test_no_answer_and_hardly_a_question_is_there_twice(rows: tuple[DemoRow, ...]) -> None:
    assert len({row.answer.partition(". ")[2] for row in rows}) == len(rows)
    # A property and its setter, or two branches of an `if`, share one name.
    assert len({row.question for row in rows}) > 0.98 * len(rows)


@pytest.mark.slow
def test_a_known_function_is_asked_and_answered_in_the_fixed_wording(
    rows: tuple[DemoRow, ...],
) -> None:
    (row,) = (row for row in rows if "`fnmatch.fnmatch`" in row.question)
    assert row.answer == "`fnmatch` is part of `fnmatch`. Test whether FILENAME matches PATTERN."


@pytest.mark.slow
def test_every_wording_is_used_for_its_share_of_questions(rows: tuple[DemoRow, ...]) -> None:
    openings = [row.question.split("`")[0] for row in rows]
    shares = {opening: openings.count(opening) / len(openings) for opening in set(openings)}
    assert len(shares) == 4
    assert all(0.2 < share < 0.3 for share in shares.values())


@pytest.mark.slow
def test_rows_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    count = write_rows(tmp_path / "new" / "rows.jsonl")
    written = (tmp_path / "new" / "rows.jsonl").read_bytes()
    other = tmp_path / "other.jsonl"
    code = "import pathlib, sys, job.demo.docstrings as r; r.write_rows(pathlib.Path(sys.argv[1]))"
    # Another process has another hash seed, so the order of any set would differ.
    subprocess.run([sys.executable, "-c", code, str(other)], check=True)
    assert other.read_bytes() == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]
    rows = [json.loads(line) for line in written.splitlines()]
    assert count == len(rows)
    assert {frozenset(row) for row in rows} == {frozenset({"question", "answer"})}


def test_python_without_sources_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="installed with its sources"):
        read_rows()


def test_sweep_file_has_numbers_where_yaml_readers_could_see_strings() -> None:
    path = Path(job.demo.__file__).with_name("sweep.yaml")
    sweep = yaml.safe_load(path.read_text())
    assert sweep["name"] == "demo"
    assert sweep["metric"] == {"name": "eval/loss", "goal": "minimize"}
    rate = sweep["parameters"]["learning_rate"]
    assert (rate["min"], rate["max"]) == (2e-4, 2e-2)


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, job.demo.run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
