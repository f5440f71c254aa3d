"""A queue with several workers: cards, slots, signals, codes.

`pytest tests/test_supervisor_workers.py`

The trials are shell scripts, as in `tests/test_supervisor.py`; `$4` is the worker's number.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from job.errors import ExitCode
from job.log import is_marked, log, set_up_logging
from tests.process.test_oom import _v2
from tests.test_supervisor import KILLED, LOG, _await_ready, _run, _slots, _start

ON_CPU = {"JOB_DEVICE": "cpu", "JOB_WORKERS": "2"}
WAIT_FOR = 'n=0; while [ ! -e "$OUT/{}" ] && [ $n -lt 300 ]; do sleep 0.05; n=$((n+1)); done; '


def test_two_workers_are_at_two_slots_at_once_and_each_slot_runs_once(tmp_path: Path) -> None:
    meet = (
        ': > "$OUT/at-$JOB_COMPLETION_INDEX"; case "$JOB_COMPLETION_INDEX" in 0) '
        + WAIT_FOR.format("at-1") + ";; 1) " + WAIT_FOR.format("at-0") + ";; esac; "
    )  # fmt: skip
    script = LOG + meet.replace("; ;;", ";;") + "[ $n ] && [ $n -ge 300 ] && exit 70; exit 0"
    code, _, err = _run("queue", script, tmp_path, JOB_NUM_TRIALS="5", **ON_CPU)
    assert code == ExitCode.OK, err
    assert sorted(_slots(tmp_path)) == [0, 1, 2, 3, 4]
    assert "queue: 2 workers, one trial at a time each" in err


@pytest.mark.parametrize(
    ("visible", "asked", "cards"),
    [
        ("3,1", "2", {"1": "3", "2": "1"}),
        ("GPU-a,GPU-b,GPU-c", "auto", None),
        ("0,1,-1,2", "auto", None),
    ],
)
def test_each_worker_has_a_card_of_its_own(
    tmp_path: Path, visible: str, asked: str, cards: dict[str, str] | None
) -> None:
    names = visible.partition(",-1")[0].split(",")
    cards = cards or {str(n): name for n, name in enumerate(names, 1)}
    # Each worker says its card, and ends when all have.
    script = (
        'echo "$CUDA_VISIBLE_DEVICES" > "$OUT/card-$4"; n=0; '
        f'while [ $(ls "$OUT" | grep -c card) -lt {len(cards)} ] && [ $n -lt 300 ]; do'
        " sleep 0.05; n=$((n+1)); done; exit 0"
    )
    settings = {"CUDA_VISIBLE_DEVICES": visible, "JOB_WORKERS": asked, "JOB_NUM_TRIALS": "3"}
    code, _, err = _run("queue", script, tmp_path, **settings)
    assert code == ExitCode.OK, err
    seen = {
        path.name.partition("-")[2]: path.read_text().strip() for path in tmp_path.glob("card-*")
    }
    assert seen == cards


def test_more_workers_than_cards_are_refused(tmp_path: Path) -> None:
    settings = {"CUDA_VISIBLE_DEVICES": "0,1", "JOB_WORKERS": "3"}
    code, _, err = _run("queue", LOG + "exit 0", tmp_path, **settings)
    assert code == ExitCode.SETTINGS
    assert "JOB_WORKERS: is 3, and 2 GPUs are visible" in err
    assert not (tmp_path / "slots").exists()


def test_workers_without_a_driver_end_in_72(tmp_path: Path) -> None:
    code, _, err = _run("queue", LOG + "exit 0", tmp_path, JOB_WORKERS="auto")
    assert (code, "libnvidia-ml.so.1" in err) == (ExitCode.GPU, True)


def test_auto_on_the_cpu_is_one_unmarked_worker(tmp_path: Path) -> None:
    settings = {"JOB_DEVICE": "cpu", "JOB_WORKERS": "auto", "JOB_NUM_TRIALS": "2"}
    script = 'echo "$#" >> "$OUT/slots"; exit 0'
    assert _run("queue", script, tmp_path, **settings)[0] == ExitCode.OK
    assert _slots(tmp_path) == [2, 2], "--heartbeat-fd is $0; its number and --of-queue"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_workers_share_the_cores(tmp_path: Path) -> None:
    script = 'echo "$OMP_NUM_THREADS" >> "$OUT/slots"; exit 0'
    assert _run("queue", script, tmp_path, JOB_NUM_TRIALS="1", **ON_CPU)[0] == ExitCode.OK
    assert _slots(tmp_path) == [len(os.sched_getaffinity(0)) // 2]


def _end_both(tmp_path: Path, codes: tuple[int, int], num_trials: int) -> tuple[int, str]:
    """Two trials that leave with these codes at SIGTERM; signalled once both run."""
    os.mkfifo(tmp_path / "ready")
    script = (
        f'trap "exit $((JOB_COMPLETION_INDEX ? {codes[1]} : {codes[0]}))" TERM; '
        ': > "$OUT/at-$4"; [ -e "$OUT/at-1" ] && [ -e "$OUT/at-2" ] && echo > "$OUT/ready"; '
        "sleep 60 & wait"
    )
    parent = _start("queue", script, tmp_path, JOB_NUM_TRIALS=str(num_trials), **ON_CPU)
    _await_ready(tmp_path)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    return parent.returncode, err


@pytest.mark.parametrize(
    ("codes", "num_trials", "expected"),
    [
        ((75, 75), 3, 75),
        ((0, 0), 2, 0),
        ((0, 0), 3, 75),
        ((0, 75), 2, 75),
        ((75, 74), 2, 74),
        ((64, 0), 2, 75),
    ],
)
def test_one_sigterm_ends_all_workers_and_their_codes_become_one(
    tmp_path: Path, codes: tuple[int, int], num_trials: int, expected: int
) -> None:
    started = time.monotonic()
    code, err = _end_both(tmp_path, codes, num_trials)
    assert code == expected, err
    assert "SIGTERM: ending the trial" in err
    assert time.monotonic() - started < 10
    left = num_trials - codes.count(0)
    assert (f"told to end, {left} of {num_trials} slots are left" in err) == (left > 0)


@pytest.mark.slow
def test_a_deaf_worker_does_not_keep_the_other_one_from_its_own_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    script = (
        "[ $4 = 1 ] && trap '' TERM || trap 'echo > $OUT/stopped; exit 75' TERM; "
        ': > "$OUT/at-$4"; [ -e "$OUT/at-1" ] && [ -e "$OUT/at-2" ] && echo > "$OUT/ready"; '
        "while :; do sleep 1; done"
    )
    settings = {**ON_CPU, "JOB_GRACE_SECONDS": "5", "JOB_NUM_TRIALS": "2"}
    parent = _start("queue", script, tmp_path, **settings)
    _await_ready(tmp_path)
    started = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == ExitCode.PREEMPTED, err
    assert time.monotonic() - started < 5
    assert (tmp_path / "stopped").exists()
    assert err.count("told to end; the next attempt goes on from the last checkpoint") == 1


def test_what_no_trial_survives_ends_the_queue_once_the_running_trials_have_ended(
    tmp_path: Path,
) -> None:
    script = LOG + (
        'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then ' + WAIT_FOR.format("at-1") + ": > $OUT/refused;"
        " exit 64; fi; : > $OUT/at-1; " + WAIT_FOR.format("refused") + "sleep 0.3; : > $OUT/done;"
        " exit 0"
    )
    code, _, err = _run("queue", script, tmp_path, JOB_NUM_TRIALS="4", **ON_CPU)
    assert code == ExitCode.SETTINGS
    assert sorted(_slots(tmp_path)) == [0, 1], "no slot is begun after it"
    assert (tmp_path / "done").exists(), "hours of training are not thrown away"
    assert "slot 0 ended with 64, which every other slot would, too" in err


def test_a_broken_card_does_not_eat_up_the_line(tmp_path: Path) -> None:
    # The sound card's first trial lasts until the broken one has given up.
    script = (
        'if [ $4 = 2 ]; then echo . >> "$OUT/faults"; exit 72; fi; ' + LOG
        + "n=0; while [ $(wc -l < $OUT/faults) -lt 3 ] && [ $n -lt 600 ]; do sleep 0.05;"
        " n=$((n+1)); done; exit 0"
    )  # fmt: skip
    code, _, err = _run("queue", script, tmp_path, JOB_NUM_TRIALS="4", **ON_CPU)
    assert (code, sorted(_slots(tmp_path))) == (ExitCode.OK, [0, 1, 2, 3]), err
    assert "worker 2: its GPU failed 3 times in a row; the others go on without it" in err


def test_where_all_cards_are_broken_the_queue_ends_in_72(tmp_path: Path) -> None:
    code, out, _ = _run("queue", "exit 72", tmp_path, JOB_NUM_TRIALS="2", **ON_CPU)
    assert code == ExitCode.GPU
    assert len(json.loads(out)) >= 4, "each with waits in between"


def test_a_worker_that_waits_holds_up_no_other(tmp_path: Path) -> None:
    script = LOG + (
        'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then echo . >> $OUT/tried; exit 74; fi; '
        + WAIT_FOR.format("tried") + "exit 0"
    )  # fmt: skip
    code, out, _ = _run("queue", script, tmp_path, JOB_NUM_TRIALS="4", **ON_CPU)
    assert code == ExitCode.OUTAGE
    assert sorted(_slots(tmp_path)) == [0, 0, 0, 1, 2, 3]
    first, second = json.loads(out)
    assert 3 < first <= 5, "what was left of the back-off once the others were done"
    assert second == 30


def test_a_slot_that_another_worker_holds_is_looked_at_by_one_of_them_at_a_time(
    tmp_path: Path,
) -> None:
    held = '[ "$JOB_COMPLETION_INDEX" = 0 ] && [ $(grep -c "^0$" $OUT/slots) -lt 3 ] && exit 75; '
    settings = {"JOB_NUM_TRIALS": "3", "JOB_LEASE_SECONDS": "7", **ON_CPU}
    code, _, err = _run("queue", LOG + held + "exit 0", tmp_path, **settings)
    assert code == ExitCode.OK, err
    assert sorted(_slots(tmp_path)) == [0, 0, 0, 1, 2]


def test_a_queue_tells_why_a_trial_was_killed(tmp_path: Path) -> None:
    _v2(tmp_path, 0)
    (tmp_path / "proc").mkdir(exist_ok=True)
    script = '[ "$JOB_COMPLETION_INDEX" = 1 ] && exit 0; ' + KILLED + "kill -KILL $$"
    _, _, err = _run("queue", script, tmp_path, JOB_NUM_TRIALS="2", **ON_CPU)
    assert "slot 0: out of memory: the kernel killed the trial at the limit of 8 GiB" in err


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_lines_are_marked_by_worker_only_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    handlers = logging.getLogger().handlers[:]
    try:
        lines = []
        for worker in (None, 2):
            stream = io.StringIO()
            monkeypatch.setattr("sys.stderr", stream)
            set_up_logging(log_format, worker=worker)
            assert is_marked() == (worker is not None)
            log.warning("a line")
            lines.append(stream.getvalue())
    finally:
        logging.getLogger().handlers[:] = handlers
    if log_format == "json":
        assert [json.loads(line).get("worker") for line in lines] == [None, 2]
    else:
        assert [line[9:] for line in lines] == ["warning: a line\n", "[2] warning: a line\n"]
