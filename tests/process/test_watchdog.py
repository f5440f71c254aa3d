"""A process that stands still is ended, a slow one is not.

`pytest tests/process/test_watchdog.py`
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.process.stop import Stop
from job.process.watchdog import Patience, Watchdog

PATIENCE = Patience(
    seconds=300, step_medians=20, first_step_seconds=900, tick_seconds=5, sign_bytes=1_000_000
)


def _watchdog() -> tuple[Stop, Watchdog]:
    stop = Stop(15)
    watchdog = Watchdog(stop, lambda _: None, patience=PATIENCE)
    watchdog.look(5)  # what was before is no silence
    return stop, watchdog


def _silent(watchdog: Watchdog, seconds: float, lived: float = 5.0) -> str | None:
    """Look for so long while nothing happens; the first complaint."""
    for _ in range(int(seconds / lived)):
        if (reason := watchdog.look(lived)) is not None:
            return reason
    return None


def test_a_training_without_a_micro_batch_for_five_minutes_hangs() -> None:
    _, watchdog = _watchdog()
    with watchdog.phase("training", by_bytes=False):
        watchdog.hear({"step": 0})
        watchdog.hear({"step": 1})
        assert _silent(watchdog, 295) is None
        reason = _silent(watchdog, 20)
    assert reason is not None
    assert "no sign of life from training for 300 s" in reason


def test_the_first_step_may_take_longer() -> None:
    _, watchdog = _watchdog()
    with watchdog.phase("training", by_bytes=False):
        assert _silent(watchdog, 890) is None
        assert _silent(watchdog, 20) is not None


def test_twenty_median_steps_are_waited_for_where_that_is_longer() -> None:
    now = 0.0
    watchdog = Watchdog(Stop(15), lambda _: None, patience=PATIENCE, clock=lambda: now)
    for step in range(9):
        watchdog.hear({"step": step})
        now += 600 if step == 4 else 30  # once an evaluation in between
    watchdog.hear({"step": 3})  # another attempt's step is no long step of this one
    with watchdog.phase("training", by_bytes=False):
        assert watchdog.limit_seconds() == 600


def test_a_long_but_living_evaluation_is_left_alone() -> None:
    stop, watchdog = _watchdog()
    with watchdog.phase("training", by_bytes=False):
        watchdog.hear({"step": 0})
        watchdog.hear({"step": 1})
        for _ in range(50):  # four hours, a micro-batch every 290 s
            stop.check()
            assert _silent(watchdog, 290) is None


def test_a_long_load_lives_as_long_as_bytes_move(tmp_path: Path) -> None:
    _, watchdog = _watchdog()
    (tmp_path / "shard").write_bytes(bytes(2_000_000))
    with watchdog.phase("loading the model"):
        for _ in range(20):
            assert _silent(watchdog, 290) is None
            (tmp_path / "shard").read_bytes()
        assert _silent(watchdog, 600) is not None, "and not longer"


def test_bytes_of_background_uploads_are_no_sign_of_life_from_training(tmp_path: Path) -> None:
    _, watchdog = _watchdog()
    (tmp_path / "shard").write_bytes(bytes(2_000_000))
    with watchdog.phase("training", by_bytes=False):
        watchdog.hear({"step": 0})
        watchdog.hear({"step": 1})
        watchdog.look(5)
        reasons = []
        for _ in range(70):
            (tmp_path / "shard").read_bytes()
            reasons.append(watchdog.look(5))
    assert any(reasons)


def test_an_outage_that_the_store_bears_is_no_hang() -> None:
    _, watchdog = _watchdog()
    with watchdog.phase("the store", outage_minutes=20):
        assert _silent(watchdog, 20 * 60 + 290) is None
        assert _silent(watchdog, 20) is not None


def test_a_frozen_and_woken_process_is_not_taken_for_hung() -> None:
    stop, watchdog = _watchdog()
    with watchdog.phase("training", by_bytes=False):
        watchdog.hear({"step": 0})
        watchdog.hear({"step": 1})
        assert _silent(watchdog, 200) is None
        assert watchdog.look(9000) is None, "frozen for hours: one tick"
        stop.check()
        assert _silent(watchdog, 290) is None


PROGRAM = """
import ctypes, os, sys, threading, time
from job.process.stop import Stop
from job.process.watchdog import Patience, Watchdog

def die(reason):
    print(reason, flush=True)
    os._exit(74)

patience = Patience(seconds=0.3, first_step_seconds=0.3, tick_seconds=0.05)
stop = Stop(15)
watchdog = Watchdog(stop, die, patience=patience)
watchdog.start()
def release(reason):
    print("lease released", flush=True)
def the_place_where_it_hangs():
    {hang}
with watchdog.acting_before_the_end(release), watchdog.phase("training", by_bytes=False):
    the_place_where_it_hangs()
"""


def _program(hang: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(hang=hang)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env={"PATH": os.environ["PATH"]},
    )  # fmt: skip


@pytest.mark.parametrize(
    "hang", ["threading.Event().wait()", "ctypes.CDLL(None).sleep(60)"],
    ids=["waiting for ever", "a blocking C call"],
)  # fmt: skip
def test_a_hung_process_dumps_all_stacks_and_ends_with_74(hang: str) -> None:
    program = _program(hang)
    out, err = program.communicate(timeout=30)
    assert program.returncode == 74, err
    assert "the_place_where_it_hangs" in err
    assert "most recent call first" in err
    assert out.splitlines()[0] == "lease released"
    assert "hang: no sign of life from training" in out


ANOTHER_ACT = """
    with watchdog.acting_before_the_end(lambda reason: print("another act", flush=True)):
        {inside}
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("inside", "act"), [("threading.Event().wait()", "another act"), ("pass", "lease released")]
)
def test_the_act_before_the_end_is_that_of_the_innermost_block(inside: str, act: str) -> None:
    out, err = _program(ANOTHER_ACT.format(inside=inside)).communicate(timeout=30)
    assert out.splitlines()[0] == act, err


@pytest.mark.slow
def test_a_process_frozen_for_longer_than_the_limit_goes_on_when_it_is_woken() -> None:
    program = _program(
        "print('ready', flush=True); [stop.check() or time.sleep(0.01) for _ in range(50)]"
    )
    assert program.stdout is not None
    program.stdout.readline()
    program.send_signal(signal.SIGSTOP)
    time.sleep(0.8)  # the limit is 0.3 s; nothing can be awaited of a frozen process
    program.send_signal(signal.SIGCONT)
    out, err = program.communicate(timeout=30)
    assert program.returncode == 0, out + err
