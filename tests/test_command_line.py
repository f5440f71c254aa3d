"""The verbs' help: an example each, quick, and no word without a function.

`pytest tests/test_command_line.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.__main__ import _VERBS, main
from job.command_line import VERBS, parse
from job.errors import ExitCode


def test_every_word_has_its_function() -> None:
    assert list(_VERBS) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example_that_can_be_parsed(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == ExitCode.OK
    example = capsys.readouterr().out.splitlines()[-1]
    assert example.startswith("example: ")
    words = example.partition(" job")[2].replace("'wrong rows'", "rows").split()
    assert parse(words).verb == verb


def test_without_a_word_one_trial_runs() -> None:
    assert parse([]).verb == "run"


def test_what_is_not_said_is_the_harmless_choice() -> None:
    assert parse(["gc"]).unused_hours == "24", "prepared rows of a sweep that is just begun stay"
    assert (parse(["gc"]).dry_run, parse(["gc"]).old_generations) == (False, False)
    assert parse(["status"]).prometheus is None
    assert str(parse(["status", "--prometheus"]).prometheus) == "-", "to the terminal"


def test_an_unknown_word_is_64_and_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == ExitCode.SETTINGS
    assert "status" in capsys.readouterr().err


def test_the_version_names_the_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "IMAGE_REVISION", "0123abc")
    assert main(["--version"]) == ExitCode.OK
    assert "commit: 0123abc" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["status --prometheus", "report --output", "best --download", "best --merge"]
)
def test_an_empty_path_is_not_this_folder(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), ""]) == ExitCode.SETTINGS
    assert f"argument {words.split()[1]}: is empty; give a path" in capsys.readouterr().err


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_samples_are_not_written_over_a_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOB_OUTPUT_URI", str(tmp_path))
    assert main(["status", "--prometheus", path]) == ExitCode.SETTINGS
    assert f"status --prometheus: {path}: Is a directory" in capsys.readouterr().err


def test_help_says_the_default_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == ExitCode.OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert told["JOB_NUM_TRIALS"].endswith(" (12)")
    assert told["JOB_LEARNING_RATE"].endswith(" (0.0002)")
    assert told["JOB_PROMPT_COLUMN"].endswith(" (none)")
    assert told["JOB_SWEEP_FILE"].endswith("default: the card's"), "said already"
    required = {name for name, meaning in told.items() if meaning.endswith(" (required)")}
    assert required == {"JOB_DATASET_URI", "JOB_OUTPUT_URI"}


@pytest.mark.parametrize(
    ("verb", "words"), [("redo", "redo [-h] SLOT"), ("exclude", "exclude [-h] --reason TEXT SLOT")]
)
def test_what_a_verb_cannot_do_without_is_no_option(
    verb: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[0] == f"usage: job {words}"
    assert parse([verb]).slot is None, "the verb says what is missing, in one line"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "exit 75 (preempted): told to end before the trial began\n"),
        (["trial", "--of-queue"], "exit 75 (preempted): told to end before the trial began\n"),
        (["status"], "exit 75 (preempted): told to end\n"),
    ],
)
def test_a_sigterm_during_the_imports_is_told_once_and_as_it_is(
    tmp_path: Path, words: list[str], said: str
) -> None:
    """The first module that is imported after the handler is one that sends the signal."""
    (tmp_path / "argparse.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    done = subprocess.run(
        [sys.executable, "-m", "job", *words],
        cwd=Path(__file__).parent.parent,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (75, said)
