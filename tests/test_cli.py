"""The verbs: their help, an example each, and what is read from their arguments.

`pytest tests/test_cli.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.__main__ import main
from job.cli import VERBS, parse
from job.errors import ExitCode, SettingsError
from job.ledger.ledger import Ledger
from job.ledger.redo import read_slot
from job.store.local import LocalStore
from job.verbs import read_hours, read_reason
from tests import forked
from tests.ledger.documents import make_identity, make_spec


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


def test_a_repository_that_is_none_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOB_OUTPUT_URI", str(tmp_path))
    assert main(["best", "--push", "x", "--merged"]) == ExitCode.SETTINGS
    assert "best --push: 'x' is no repository; give OWNER/NAME" in capsys.readouterr().err


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
    ("verb", "words"),
    [("redo", "redo [-h] [--json] SLOT"), ("exclude", "exclude [-h] [--json] --reason TEXT SLOT")],
)
def test_what_a_verb_cannot_do_without_is_no_option(
    verb: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[0] == f"usage: job {words}"
    assert parse([verb]).slot is None, "the verb says what is missing, in one line"


@pytest.mark.parametrize("text", [None, "x", "-1", "3", "1.0", "²", "", "99999999999999999999"])
def test_a_slot_that_is_none_is_one_clear_line(text: str | None) -> None:
    with pytest.raises(SettingsError, match=r"^redo: .*allowed: 0 to 2$"):
        read_slot(text, "redo", 3)


@pytest.mark.parametrize("text", [None, "", " \n ", "x" * 501])
def test_a_reason_has_to_say_something_short(text: str | None) -> None:
    with pytest.raises(SettingsError, match="1 to 500 characters"):
        read_reason(text)
    assert read_reason(" wrong\n  rows ") == "wrong rows"
    assert read_reason("x" * 500)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "100001", "a day", ""])
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="allowed: 0 to 100000"):
        read_hours(text)
    assert [read_hours(hours) for hours in ("0", "1.5", "100000")] == [0, 1.5, 100_000]


def test_a_slot_beyond_job_num_trials_can_be_named_if_it_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JOB_NUM_TRIALS was larger when the sweep drew it."""
    ledger = Ledger(LocalStore(tmp_path), "s")
    ledger.open_sweep(make_identity())
    for number in range(4):
        ledger.slot(number).specify(make_spec())
    for name, value in {"OUTPUT_URI": tmp_path, "SWEEP_NAME": "s", "NUM_TRIALS": 2}.items():
        monkeypatch.setenv(f"JOB_{name}", str(value))
    assert VERBS["redo"].run(parse(["redo", "3"])) == (
        "slot 3: begun again (redo 1, same parameters); start a worker for it, a Job whose index is"
        " complete does not"
    )
    excluded = VERBS["exclude"].run(parse(["exclude", "3", "--reason", "why"]))
    assert str(excluded).startswith("slot 3: excluded (why)")
    with pytest.raises(SettingsError, match="allowed: 0 to 3"):
        VERBS["redo"].run(parse(["redo", "4"]))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("redo 0", "JOB_OUTPUT_URI, JOB_SWEEP_NAME: there is no sweep card in"),
        ("exclude 0", "exclude: --reason TEXT is needed"),
        ("gc --unused-hours soon", "gc: --unused-hours is 'soon'; allowed: 0 to 100000"),
    ],
)
def test_bad_arguments_end_in_one_line_and_64(tmp_path: Path, line: str, says: str) -> None:
    done = forked.run(
        [sys.executable, "-m", "job", *line.split()], timeout=60,
        env={"PATH": os.environ["PATH"], "JOB_OUTPUT_URI": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 64
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_several_mistakes_are_all_in_the_last_line(tmp_path: Path) -> None:
    wrong = {"JOB_SEED": "soon", "JOB_NUM_TRIALS": "0", "JOB_OUTPUT_URI": str(tmp_path)}
    done = forked.run(
        [sys.executable, "-m", "job", "status"], timeout=60,
        env={"PATH": os.environ["PATH"]} | wrong, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 64
    last = done.stderr.splitlines()[-1]
    assert "exit 64 (settings): " in last
    assert "JOB_SEED: " in last
    assert "; JOB_NUM_TRIALS: " in last or "; JOB_SEED: " in last


NOBODY = str(2**22 + 1)  # more than a process id can be


def test_a_verb_whose_parent_died_while_it_began_ends_at_once(tmp_path: Path) -> None:
    done = forked.run(
        [sys.executable, "-m", "job", "--with-parent", NOBODY, "status", "--watch"],
        timeout=20,
        env={"PATH": os.environ["PATH"], "JOB_OUTPUT_URI": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (75, "exit 75 (preempted): told to end\n")


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


# `job status` whose verb is this code; a Ctrl-C is a SIGINT to oneself.
INTERRUPTED = """
import atexit, os, runpy, signal, sys
from dataclasses import replace
from functools import partial
from job import cli
interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
{start}
def verb(_):
    {verb}
cli.VERBS["status"] = replace(cli.VERBS["status"], run=verb)
sys.argv = ["job", "status"]
runpy.run_module("job", run_name="__main__", alter_sys=True)
"""
ENVIRON = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.mark.parametrize(
    ("start", "verb", "code", "said"),
    [
        ("", "interrupt()", 75, "exit 75 (preempted): interrupted\n"),
        (
            "",
            "try: interrupt()\n    finally: interrupt()",
            75,
            "exit 75 (preempted): told to end\n",
        ),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "interrupt(); return 'done'", 0, "done\n"),
    ],
    ids=["once", "again on the way down", "ignored from the start"],
)
def test_an_interrupt_is_75_unless_whoever_started_us_ignores_it(
    start: str, verb: str, code: int, said: str
) -> None:
    script = INTERRUPTED.format(start=start, verb=verb)
    done = forked.run([sys.executable, "-c", script], env=ENVIRON, timeout=60)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines(keepends=True)
    assert line.endswith(said)


def test_an_interrupt_inside_an_exec_is_75_as_well(tmp_path: Path) -> None:
    """As the making of a dataclass is, while a library is imported; seen with `python -m` only."""
    script = INTERRUPTED.format(start="", verb="exec('interrupt()', globals())")
    (tmp_path / "interrupted.py").write_text(script)
    environ = {**ENVIRON, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRON['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert done.stderr.endswith("exit 75 (preempted): interrupted\n")


def test_an_interrupt_while_python_ends_changes_no_code() -> None:
    script = INTERRUPTED.format(start="", verb="atexit.register(interrupt); return 'done'")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=ENVIRON, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.endswith("exit 0 (ok): done")) == (0, True)
