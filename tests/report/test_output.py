"""The output of `status`, `report` and `best`, also where it does not fit or nobody reads it.

`pytest tests/report/test_output.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from job.__main__ import main
from job.cli import VERBS
from job.errors import ExitCode
from job.ledger.ledger import Ledger
from job.report.findings import findings
from job.report.overview import Overview, SlotView
from job.report.page import html_page, markdown
from job.store.local import LocalStore
from tests import forked
from tests.ledger.documents import make_identity, make_result, make_spec

ROOT = Path(__file__).parents[2]
SWEEP = {
    "method": "bayes",
    "metric": {"name": "eval/loss", "goal": "minimize"},
    "parameters": {"lora_r": {"values": [8, 16]}},
}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ["status", "status --json", "status --watch", "report", "best"])
def test_a_full_disk_behind_stdout_is_named(words: str, unbuffered: str, tmp_path: Path) -> None:
    _committed_sweep(tmp_path)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "job", *words.split()],
            env=_environ(tmp_path) | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.endswith("exit 74 (outage): stdout: no space left: free it, or print elsewhere")
    assert done.returncode == 74


def _committed_sweep(folder: Path) -> Ledger:
    ledger = Ledger(LocalStore(folder / "out"), "s")
    ledger.open_sweep(make_identity())
    ledger.slot(0).specify(make_spec())
    ledger.slot(0).commit(make_result())
    return ledger


def _environ(folder: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JOB_SWEEP_NAME": "s",
        "JOB_OUTPUT_URI": f"{folder}/out", "JOB_NUM_TRIALS": "1",
        "JOB_WORK_DIR": f"{folder}/work",
    }  # fmt: skip


@pytest.fixture
def unread() -> Iterator[int]:
    """The end of a pipe that nobody reads any more."""
    ours, theirs = os.pipe()
    os.close(ours)
    yield theirs
    os.close(theirs)


@pytest.mark.parametrize("words", [
    "status", "status --json", "status --watch", "status --prometheus", "best",
    "report --json", "gc --json --dry-run", "exclude 0 --reason z --json",
])  # fmt: skip
def test_a_verb_whose_reader_has_gone_ends_quietly_as_by_sigpipe(
    words: str, unread: int, tmp_path: Path
) -> None:
    ledger = _committed_sweep(tmp_path)
    started = forked.popen(
        [sys.executable, "-m", "job", *words.split()],
        env=_environ(tmp_path), stdout=unread, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (141, "")
    assert ("exclude" in words) == (ledger.slot(0).exclusion() == "z"), "what is done is done"


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ["status", "redo 0 --json"])
def test_nor_does_pythons_own_end_say_a_word_or_change_the_code(
    words: str, unbuffered: str, unread: int, tmp_path: Path
) -> None:
    _committed_sweep(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "job", *words.split()],
        env=_environ(tmp_path) | {"PYTHONUNBUFFERED": unbuffered},
        stdout=unread, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


def test_a_log_that_nobody_reads_leaves_the_code_as_it_is(unread: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "job", "gc"],
        env=_environ(tmp_path), stderr=unread, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 64, "there is no sweep"


def test_streams_that_were_closed_before_are_no_bug(tmp_path: Path) -> None:
    _committed_sweep(tmp_path)
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        line = f"exec {sys.executable} -m job status {closed}"
        done = subprocess.run(
            ["sh", "-c", line],
            env=_environ(tmp_path), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert ("completed" in done.stdout) == (">&-" not in closed.split())


def test_a_connection_that_breaks_is_not_taken_for_stdouts_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setitem(VERBS, "status", replace(VERBS["status"], run=broken))
    assert main(["status"]) == ExitCode.BUG


def test_both_reports_say_how_the_adapter_is_fetched_and_count_one_trial() -> None:
    view = SlotView(0, "completed", params={"lora_r": 8}, eval_loss=1.25, step=10, planned_steps=10)
    identity = make_identity(JOB_SWEEP_FILE=SWEEP)
    overview = Overview("s", "/out", identity, (view,))
    for text in (markdown(overview, usd_per_hour=None), html_page(overview, usd_per_hour=None)):
        assert "job best --download adapter" in text
    notes = " ".join(findings(overview))
    assert "with 1 trial the first" in notes
    assert "rest on 1 trial and are" in notes
