"""`job status --watch` goes on while a slot may change, and not longer.

`pytest tests/report/test_watch.py`
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.cli import parse
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.report.commands import show_status
from job.settings import Settings
from job.store.local import LocalStore
from tests.ledger.documents import make_result, make_spec

SPEC = make_spec(params={"lora_r": 8})


def test_the_watch_ends_once_no_slot_can_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    settings = Settings(dataset_uri="rows", output_uri=str(tmp_path), num_trials=4)
    ledger.slot(3).commit(make_result(ledger.slot(3).folder))  # damaged: without a spec
    lease = None

    def drawn() -> None:  # and nobody at work on it
        for slot in (0, 1, 2):
            ledger.slot(slot).specify(SPEC)

    def taken() -> None:
        nonlocal lease
        lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
        ledger.slot(1).exclude("wrong rows")
        ledger.slot(2).give_up("no progress")

    def committed() -> None:
        assert lease is not None
        lease.release()
        ledger.slot(0).commit(make_result(eval_loss=1.25))

    acts = [drawn, taken, committed]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        acts.pop(0)()  # no act left: the watch goes on for ever

    show_status(parse(["status", "--watch"]), settings, ledger, wait=wait)
    assert waits == [10, 10, 10], "empty, waiting, running"
    shown = capsys.readouterr().out
    for word in ("completed", "excluded", "given up", "damaged", "1.2500"):
        assert word in shown


def test_into_a_pipe_only_news_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(LocalStore(tmp_path), "s")
    settings = Settings(dataset_uri="rows", output_uri=str(tmp_path), num_trials=1)
    ledger.slot(0).specify(SPEC)
    lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
    assert lease is not None
    printed: list[list[str]] = []

    def wait(_seconds: float) -> None:
        lines = capsys.readouterr().out.splitlines()
        printed.append([line for line in lines if line.startswith("sweep s in ")])
        if len(printed) < 10:
            lease.report(step=len(printed))
            lease.renew()
        elif len(printed) == 10:
            lease.release()
        else:
            raise KeyboardInterrupt  # which is no error: that is how a watch is left

    show_status(parse(["status", "--watch"]), settings, ledger, wait=wait)
    counts = [len(heads) for heads in printed]
    assert counts == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1], "begun; a minute of steps; released"
    assert re.search(rf"in {tmp_path}.*, \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC$", printed[0][0])


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_an_interrupt_ends_the_watch_quietly(tmp_path: Path, on_a_terminal: bool) -> None:
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    ledger.slot(0).specify(SPEC)
    ours, theirs = pty.openpty() if on_a_terminal else os.pipe()
    watch = subprocess.Popen(
        [sys.executable, "-m", "job", "status", "--watch"],
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]),
            "TERM": "xterm", "JOB_OUTPUT_URI": f"{tmp_path}/out", "JOB_SWEEP_NAME": "s",
            "JOB_WORK_DIR": f"{tmp_path}/work",
        },
        stdout=theirs, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"waiting" not in shown:  # although the watch goes on: nothing is held back
        assert select.select([ours], [], [], 30)[0], shown
        shown += os.read(ours, 65536)
    assert b"sweep s in" in shown
    watch.send_signal(signal.SIGINT)
    _, said = watch.communicate(timeout=30)
    os.close(ours)
    assert (watch.returncode, said) == (0, "")
