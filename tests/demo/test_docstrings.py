"""The demo's rows and pre-training text, without torch: pytest tests/demo/test_docstrings.py"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import job.demo
from job.demo import library
from job.demo.answers import pick_questions
from job.demo.docstrings import Corpus, read_corpus, write_rows
from job.errors import DataError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """What this Python's own library gives; it takes 2 s to read."""
    return read_corpus()


MODULE = '''"""Read files of rows, one after another.

Blank lines are passed over without a word to anybody."""
# Two lines of a comment
# that belong together, as prose.

def read(path):
    """Return the rows of one file in their order."""

class Reader:
    """Short."""
    if True:
        def close(self):
            """Return the rows of one file in their order."""
'''


def test_a_row_is_a_first_paragraph_and_the_text_is_what_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):  # fewer are taken for a Python without its sources
        (tmp_path / f"m{number:02d}.py").touch()
    (tmp_path / "package/test").mkdir(parents=True)
    (tmp_path / "package/__init__.py").write_text(MODULE)
    (tmp_path / "package/test/skipped.py").write_text('"""Tests are no part of a library."""')
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    corpus = read_corpus.__wrapped__()
    assert [(row.question.split("`")[1], row.answer) for row in corpus.rows] == [
        ("package", "`package` is part of Python. Read files of rows, one after another."),
        (
            "package.read",
            "`read` is part of `package`. Return the rows of one file in their order.",
        ),
    ]
    assert corpus.text == (
        "Blank lines are passed over without a word to anybody.",
        "Two lines of a comment that belong together, as prose.",
    )


@pytest.mark.slow
def test_library_gives_thousands_of_ascii_rows(corpus: Corpus) -> None:
    assert 5_000 < len(corpus.rows) < 8_000
    for row in corpus.rows:
        assert (row.question + row.answer).isascii()
        assert 15 <= len(row.paragraph) <= 400
        assert row.answer.startswith("`")
        assert row.answer.endswith(". " + row.paragraph)
        assert "\n" not in row.answer


@pytest.mark.slow
def test_no_paragraph_and_hardly_a_question_is_there_twice(corpus: Corpus) -> None:
    assert len({row.paragraph for row in corpus.rows}) == len(corpus.rows)
    # A property and its setter, or two branches of an `if`, share one name.
    assert len({row.question for row in corpus.rows}) > 0.98 * len(corpus.rows)


@pytest.mark.slow
def test_path_join_is_asked_and_answered_in_the_fixed_wording(corpus: Corpus) -> None:
    (row,) = (row for row in corpus.rows if "`posixpath.join`" in row.question)
    assert row.answer.startswith("`join` is part of `posixpath`. Join two or more pathname")


@pytest.mark.slow
def test_every_wording_is_used_for_its_share_of_questions(corpus: Corpus) -> None:
    openings = [row.question.split("`")[0] for row in corpus.rows]
    shares = {opening: openings.count(opening) / len(openings) for opening in set(openings)}
    assert len(shares) == 4
    assert all(0.2 < share < 0.3 for share in shares.values())


@pytest.mark.slow
def test_no_answer_occurs_in_the_pretraining_text(corpus: Corpus) -> None:
    whole = "\n".join(corpus.text)
    assert len(whole) > 1_000_000
    # Every fifth, each looked up in all of the text: all of them take 10 s.
    found = [row.paragraph for row in corpus.rows[::5] if row.paragraph in whole]
    assert found == []


@pytest.mark.slow
def test_pretraining_text_is_prose_in_pieces_of_one_line(corpus: Corpus) -> None:
    assert len(corpus.text) > 8_000
    assert len(set(corpus.text)) == len(corpus.text)
    assert all(piece.isascii() and "\n" not in piece for piece in corpus.text)


@pytest.mark.slow
def test_rows_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    info = write_rows(tmp_path / "new" / "rows.jsonl")
    written = (tmp_path / "new" / "rows.jsonl").read_bytes()
    other = tmp_path / "other.jsonl"
    code = "import pathlib, sys, job.demo.docstrings as r; r.write_rows(pathlib.Path(sys.argv[1]))"
    # Another process has another hash seed, so the order of any set would differ.
    subprocess.run([sys.executable, "-c", code, str(other)], check=True)
    assert other.read_bytes() == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]
    assert info.sha256 == hashlib.sha256(written).hexdigest()
    assert info.python_version == platform.python_version()
    rows = [json.loads(line) for line in written.splitlines()]
    assert info.num_rows == len(rows)
    assert {frozenset(row) for row in rows} == {frozenset({"question", "answer"})}


def test_python_without_sources_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="installed with its sources"):
        list(library.read_library())


def test_questions_are_picked_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ({"question": f"q{i}", "answer": "a"} for i in range(100))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picked = pick_questions(path, 3, seed=17)
    assert len(set(picked)) == 3
    assert picked == pick_questions(path, 3, seed=17)
    assert picked != pick_questions(path, 3, seed=18)


def test_sweep_file_has_numbers_where_yaml_readers_could_see_strings() -> None:
    path = Path(job.demo.__file__).with_name("sweep.yaml")
    sweep = yaml.safe_load(path.read_text())
    assert sweep["name"] == "demo"
    assert sweep["metric"] == {"name": "eval/loss", "goal": "minimize"}
    rate = sweep["parameters"]["learning_rate"]
    assert (rate["min"], rate["max"]) == (2e-4, 2e-2)


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, job.demo.generated_base, job.demo.answers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
