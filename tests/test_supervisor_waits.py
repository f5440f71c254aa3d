"""The parent waits for slots of other workers, and stops waiting when it is told to end.

`pytest tests/test_supervisor_waits.py`
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.errors import ExitCode
from job.ledger.lease import acquire
from job.ledger.ledger import Ledger
from job.store.local import LocalStore
from tests.test_supervisor import LOG, READY, _await_ready, _run, _slots, _start
from tests.wandb.workers import eventually
from tests.workers import make_inputs

ROOT = Path(__file__).parent.parent

# Another worker holds a slot of this list until it was looked at three times.
HELD = '[ $(grep -c "^$JOB_COMPLETION_INDEX$" $OUT/slots) -ge 3 ] || exit 75; exit 0'


def test_a_queue_whose_slots_are_all_held_looks_again_a_lease_later(tmp_path: Path) -> None:
    """Each look starts a Python and watches a lease: without the wait it would spin."""
    settings = {"JOB_NUM_TRIALS": "3", "JOB_LEASE_SECONDS": "7"}
    script = LOG + '[ "$JOB_COMPLETION_INDEX" = 0 ] && exit 0; ' + HELD
    code, out, _ = _run("queue", script, tmp_path, **settings)
    assert (code, _slots(tmp_path)) == (0, [0, 1, 2, 1, 2, 1, 2])
    assert json.loads(out) == [7.0] * 3, "from when both were seen to be held until one was free"


def test_a_queue_with_a_free_slot_left_takes_it_first(tmp_path: Path) -> None:
    script = LOG + '[ "$JOB_COMPLETION_INDEX" = 2 ] && exit 0; ' + HELD
    code, out, _ = _run("queue", script, tmp_path, JOB_NUM_TRIALS="3", JOB_LEASE_SECONDS="7")
    assert (code, _slots(tmp_path)) == (0, [0, 1, 2, 0, 1, 0, 1])
    assert json.loads(out) == [7.0], "only once the two that are left were both held"


@pytest.mark.parametrize(("code", "wait_seconds"), [(75, 120), (72, 5)], ids=["held", "back-off"])
def test_a_sigterm_while_the_queue_waits_ends_it_at_once_with_75(
    tmp_path: Path, code: int, wait_seconds: float
) -> None:
    os.mkfifo(tmp_path / "ready")
    script = READY + f"exit {code}"
    parent = _start("really wait", script, tmp_path, JOB_NUM_TRIALS="1", JOB_LEASE_SECONDS="120")
    _await_ready(tmp_path)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    eventually(lambda: not children.read_text(), 10)  # the trial has ended, so the queue waits
    started = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == ExitCode.PREEMPTED, err
    assert time.monotonic() - started < 0.8 * wait_seconds


@pytest.mark.slow
def test_a_slot_of_another_worker_is_no_error_of_the_queue(tmp_path: Path) -> None:
    given = make_inputs(tmp_path) | {"num_trials": 1, "lease_seconds": 2}
    ledger = Ledger(LocalStore(tmp_path / "out"), "s")
    lease = acquire(ledger, [0], lease_seconds=60, should_stop=lambda: None)
    assert lease is not None
    environ = {f"JOB_{name.upper()}": str(value) for name, value in given.items()}
    said = tmp_path / "said"
    with said.open("w") as file:
        queue = subprocess.Popen(
            [sys.executable, "-m", "job", "queue"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
            stderr=file, cwd=tmp_path,
        )  # fmt: skip

    def is_told() -> bool:
        lease.renew()
        return "the queue goes on" in (words := said.read_text()) or "exit" in words

    try:
        eventually(is_told, 60)
    finally:
        queue.send_signal(signal.SIGTERM)
        queue.wait(60)
    words = said.read_text().partition("SIGTERM")[0]
    assert "slot 0: another attempt is at work on it; nothing is left for this one; the" in words
    assert "exit 75" not in words
    assert "error" not in words


def test_a_signal_before_the_first_trial_has_its_last_words() -> None:
    script = (
        "import os, signal; from job.supervisor import Supervisor; parent = Supervisor(15);"
        " os.kill(os.getpid(), signal.SIGTERM); ended = parent.run({});"
        " print(ended.code, ended.last_words)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"{ExitCode.PREEMPTED} told to end before the trial began"


SIGNALLED = """
import os, signal, sys
from job.process.stop import Stop
from job.supervisor import Supervisor
if sys.argv[1] == "stop":
    waiter = Stop(15)
    signal.signal(signal.SIGTERM, waiter.set)
    reset = lambda: setattr(waiter, "_deadline", None)
else:
    waiter = Supervisor(15)
    reset = lambda: setattr(waiter, "told_to_end", False)
parent = os.getpid()
if os.fork() == 0:
    for _ in range(200_000):
        os.kill(parent, signal.SIGTERM)
    os._exit(0)
while os.waitpid(-1, os.WNOHANG) == (0, 0):
    reset()
    waiter.wait(0.0001)
print("done")
"""


@pytest.mark.parametrize("waiter", ["stop", "supervisor"])
def test_signals_in_a_row_never_make_a_wait_stand_still(waiter: str) -> None:
    """A lock in the handler did: a third SIGTERM in the middle of the second one's handler."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, waiter], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "done\n"
