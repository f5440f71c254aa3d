"""The parent process: codes, signals, the queue. `pytest tests/test_supervisor.py`

The trial is replaced by small shell scripts through the environment of a real parent process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import ExitCode
from tests import forked
from tests.process.test_oom import _v1, _v2
from tests.runbook import check_row
from tests.tiers import slow

# A parent whose trials are `sh -c SCRIPT`; waits of the queue are recorded instead of slept.
PARENT = """
import ctypes, json, os, sys
from job import supervisor
from job.errors import JobError
from job.log import set_up_logging
from job.process.heartbeat import HeartbeatLimits
from job.variables import load_settings
python = sys.argv[2].startswith("import ")
supervisor.TRIAL_COMMAND = (sys.executable if python else "sh", "-c", sys.argv[2])
set_up_logging("text")
settings, _ = load_settings()
waits = []
if "as process 1" in sys.argv[1]:
    PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>: orphans below become this process' children
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
if oom := os.environ.get("OUT") and os.path.join(os.environ["OUT"], "proc"):
    if os.path.exists(oom):  # the control groups of a machine that the test has made
        from functools import partial
        from pathlib import Path
        from job.process import oom as groups
        root = Path(os.environ["OUT"])
        supervisor.oom_kills = partial(groups.oom_kills, root)
        supervisor.oom_words = partial(groups.oom_words, root)
if sys.argv[1].startswith("run"):
    silence = 0.4 if sys.argv[1] == "run" else 60
    limits = HeartbeatLimits(silence_seconds=silence, tick_seconds=0.05, words_seconds=5)
    parent = supervisor.Supervisor(settings.grace_seconds, limits)
    ended = parent.run(dict(os.environ))
    code = ended.code
    print(ended.last_words, file=sys.stderr)
elif sys.argv[1] == "one":
    code, _ = supervisor.run_one(settings)
else:
    wait = None if sys.argv[1] == "really wait" else waits.append
    try:
        code, words = supervisor.run_queue(settings, wait)
    except JobError as error:
        code, words = error.exit_code, error
    print(words, file=sys.stderr)
print(json.dumps(waits), flush=True)
sys.exit(code)
"""


def _start(verb: str, script: str, tmp_path: Path, **settings: str) -> subprocess.Popen[str]:
    environ = {
        "PATH": os.environ["PATH"],
        "JOB_DATASET_URI": "rows",
        "JOB_OUTPUT_URI": "out",
        "OUT": str(tmp_path),
        **settings,
    }
    return forked.popen(
        [sys.executable, "-c", PARENT, verb, script],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def _run(verb: str, script: str, tmp_path: Path, **settings: str) -> tuple[int, str, str]:
    parent = _start(verb, script, tmp_path, **settings)
    out, err = parent.communicate(timeout=60)
    return parent.returncode, out, err


@pytest.mark.parametrize("code", [*list(ExitCode)[:2], *slow(*list(ExitCode)[2:])])
def test_the_trials_code_is_passed_on(tmp_path: Path, code: ExitCode) -> None:
    assert _run("run", f"exit {code}", tmp_path)[0] == code


def test_an_unknown_code_is_a_bug(tmp_path: Path) -> None:
    assert _run("run", "exit 3", tmp_path)[0] == ExitCode.BUG


def test_a_killed_trial_is_named_and_counted(tmp_path: Path) -> None:
    code, _, err = _run("run", "kill -SEGV $$", tmp_path)
    assert code == ExitCode.BUG
    assert "killed by SIGSEGV" in err


KILLED = (
    "sed -i 's/oom_kill 0/oom_kill 1/' $OUT/sys/fs/cgroup/memory.events"
    " $OUT/sys/fs/cgroup/memory/memory.oom_control; "
)


@pytest.mark.parametrize("group", [_v2, _v1], ids=["version 2", "version 1"])
def test_a_trial_that_the_oom_killer_ended_is_told_with_the_limit(
    tmp_path: Path, group: Callable[[Path, int], None]
) -> None:
    group(tmp_path, 0)
    code, _, err = _run("run", KILLED + "kill -KILL $$", tmp_path)
    assert code == ExitCode.OUTAGE, err
    line = err.splitlines()[-1]
    assert line.startswith("out of memory: the kernel killed the trial at the limit of 8 GiB; ")
    assert "JOB_MAX_SEQ_LENGTH" in line
    check_row(line, code)


@pytest.mark.parametrize("script", [KILLED + "exit 64", "kill -KILL $$"])
def test_a_count_alone_and_a_kill_alone_are_no_oom_kill(tmp_path: Path, script: str) -> None:
    _v2(tmp_path, 0)
    code, _, err = _run("run", script, tmp_path)
    assert code in (ExitCode.SETTINGS, ExitCode.BUG)
    assert "out of memory" not in err


def test_an_oom_kill_on_the_way_down_is_still_a_preemption(tmp_path: Path) -> None:
    _v2(tmp_path, 0)
    script = f"trap '{KILLED.replace(chr(39), chr(34))} kill -KILL $$' TERM; " + READY
    code, _ = _signalled(tmp_path, script + "sleep 60 & wait", signal.SIGTERM)
    assert code == ExitCode.PREEMPTED


def _signalled(
    tmp_path: Path, script: str, number: signal.Signals, *, verb: str = "run", **settings: str
) -> tuple[int, str]:
    """Start a trial, wait until it says that it runs, signal the parent, wait for its end."""
    os.mkfifo(tmp_path / "ready")
    parent = _start(verb, script, tmp_path, **settings)
    _await_ready(tmp_path)
    parent.send_signal(number)
    _, err = parent.communicate(timeout=60)
    return parent.returncode, err


def _await_ready(tmp_path: Path) -> None:
    """Return once the trial has opened and closed the pipe; a trial that never does is an error."""
    descriptor = os.open(tmp_path / "ready", os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    came = poll.poll(30_000)
    os.close(descriptor)
    assert came, "the trial never said that it runs"


READY = 'echo > "$OUT/ready"; '


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGINT)])
def test_a_signal_reaches_the_trial_and_ends_in_75(tmp_path: Path, number: signal.Signals) -> None:
    script = "trap 'echo stopped > $OUT/stopped; exit 75' TERM; " + READY + "sleep 60 & wait"
    code, _ = _signalled(tmp_path, script, number)
    assert code == ExitCode.PREEMPTED
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("code", [0, 70, *slow(1, 64, 74)])
def test_after_sigterm_only_0_74_and_75_leave(tmp_path: Path, code: int) -> None:
    expected = code if code in (0, 74) else 75
    script = f"trap 'exit {code}' TERM; " + READY + "sleep 60 & wait"
    assert _signalled(tmp_path, script, signal.SIGTERM)[0] == expected


@pytest.mark.slow
def test_a_deaf_trial_is_killed_with_all_it_started(tmp_path: Path) -> None:
    script = (
        "trap '' TERM; sleep 60 & echo $! > $OUT/orphan; " + READY + "while :; do sleep 1; done"
    )
    code, err = _signalled(tmp_path, script, signal.SIGTERM, JOB_GRACE_SECONDS="5")
    assert code == ExitCode.PREEMPTED
    assert "killing it" in err
    assert err.endswith("told to end; the next attempt goes on from the last checkpoint\n")
    orphan = int((tmp_path / "orphan").read_text())
    assert not Path(f"/proc/{orphan}").exists() or "Z" in Path(f"/proc/{orphan}/stat").read_text()


@pytest.mark.slow
def test_an_orphan_that_process_1_inherits_is_reaped_and_is_not_the_trials_end(
    tmp_path: Path,
) -> None:
    look = "cat /proc/$PPID/task/$PPID/children > $OUT/children"
    script = f'sh -c "(sleep 0.2; exit 70) &"; sleep 1; {look}; exit 0'
    code, _, err = _run("run as process 1", script, tmp_path)
    assert code == ExitCode.OK, err
    assert len((tmp_path / "children").read_text().split()) == 1, "the trial alone is left"


@pytest.mark.parametrize(
    ("given", "card"), [(None, "0"), ("3,1", "3"), ("GPU-4f2c", "GPU-4f2c"), ("", "")]
)
def test_a_trial_sees_one_card(tmp_path: Path, given: str | None, card: str) -> None:
    script = 'echo "${CUDA_VISIBLE_DEVICES-unset}" > $OUT/card'
    visible = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    assert _run("one", script, tmp_path, **visible)[0] == ExitCode.OK
    assert (tmp_path / "card").read_text() == f"{card}\n"


LOG = 'echo "$JOB_COMPLETION_INDEX" >> $OUT/slots; '


def _slots(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "slots").read_text().split()]


@pytest.mark.parametrize(("given", "seen"), [(None, ":4096:8"), (":0:0", ":0:0")])
def test_a_trial_finds_cublas_told_to_repeat_itself(
    tmp_path: Path, given: str | None, seen: str
) -> None:
    wish = {} if given is None else {"CUBLAS_WORKSPACE_CONFIG": given}
    script = 'echo "$CUBLAS_WORKSPACE_CONFIG" > "$OUT/seen"'
    code, _, err = _run("queue", script, tmp_path, JOB_NUM_TRIALS="1", **wish)
    assert code == 0, err
    assert (tmp_path / "seen").read_text().strip() == seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_ends_in_75_with_a_last_line(
    tmp_path: Path, number: signal.Signals
) -> None:
    # The first package that the job imports takes for ever, as on a cold disk.
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "pydantic_settings.py").write_text(slow)
    root = str(Path(__file__).parent.parent)
    started = subprocess.Popen(
        [sys.executable, "-m", "job"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "importing\n"
    started.send_signal(number)
    _, err = started.communicate(timeout=30)
    assert started.returncode == ExitCode.PREEMPTED
    assert err == "exit 75 (preempted): told to end before the trial began\n"


def test_the_queue_runs_every_slot_in_order(tmp_path: Path) -> None:
    code, out, _ = _run("queue", LOG + "exit 0", tmp_path, JOB_NUM_TRIALS="3")
    assert (code, _slots(tmp_path), json.loads(out)) == (0, [0, 1, 2], [])


@pytest.mark.parametrize("fatal", [64, *slow(65, 77)])
def test_what_no_trial_survives_ends_the_queue(tmp_path: Path, fatal: int) -> None:
    code, _, _ = _run("queue", LOG + f"exit {fatal}", tmp_path, JOB_NUM_TRIALS="3")
    assert (code, _slots(tmp_path)) == (fatal, [0])


def test_a_stuck_slot_does_not_hold_up_the_others(tmp_path: Path) -> None:
    script = LOG + '[ "$JOB_COMPLETION_INDEX" = 1 ] && exit 69; exit 0'
    code, _, _ = _run("queue", script, tmp_path, JOB_NUM_TRIALS="3")
    assert (code, _slots(tmp_path)) == (69, [0, 1, 2])


@pytest.mark.parametrize("passing", [74, *slow(70, 72)])
def test_a_passing_failure_is_tried_three_times_with_back_off(tmp_path: Path, passing: int) -> None:
    script = LOG + f'[ "$JOB_COMPLETION_INDEX" = 0 ] && exit {passing}; exit 0'
    code, out, _ = _run("queue", script, tmp_path, JOB_NUM_TRIALS="2")
    assert (code, _slots(tmp_path), json.loads(out)) == (passing, [0, 0, 0, 1], [5.0, 30.0])


def test_a_card_that_fails_the_next_slot_too_ends_the_queue(tmp_path: Path) -> None:
    code, out, err = _run("queue", LOG + "exit 72", tmp_path, JOB_NUM_TRIALS="12")
    assert (code, _slots(tmp_path), json.loads(out)) == (72, [0, 0, 0, 1], [5.0, 30.0])
    assert "slot 1 ended with 72, which every other slot would, too" in err


def test_a_card_that_works_in_between_does_not_end_the_queue(tmp_path: Path) -> None:
    script = LOG + '[ "$JOB_COMPLETION_INDEX" = 1 ] && exit 0; exit 72'
    code, _, _ = _run("queue", script, tmp_path, JOB_NUM_TRIALS="3")
    assert (code, _slots(tmp_path)) == (72, [0, 0, 0, 1, 2, 2, 2])


def test_a_slot_owned_by_another_goes_to_the_end_of_the_line(tmp_path: Path) -> None:
    script = LOG + '[ "$JOB_COMPLETION_INDEX" = 0 ] && [ ! -e $OUT/1 ] && exit 75; : > $OUT/1'
    code, _, _ = _run("queue", script, tmp_path, JOB_NUM_TRIALS="3")
    assert (code, _slots(tmp_path)) == (0, [0, 1, 2, 0])


def test_a_signal_during_the_back_off_ends_the_queue_at_once_with_75(tmp_path: Path) -> None:
    script = '[ -e "$OUT/tried" ] || { : > "$OUT/tried"; echo > "$OUT/ready"; }; exit 72'
    started = time.monotonic()
    code, err = _signalled(tmp_path, script, signal.SIGTERM, verb="really wait", JOB_NUM_TRIALS="2")
    assert code == ExitCode.PREEMPTED, err
    assert time.monotonic() - started < 4.5, "the back-off alone is 5 s"


def test_a_signal_as_the_last_slot_commits_is_a_success(tmp_path: Path) -> None:
    script = "trap 'exit 0' TERM; " + READY + "sleep 60 & wait"
    queue = {"verb": "queue"}
    assert _signalled(tmp_path, script, signal.SIGTERM, **queue, JOB_NUM_TRIALS="1")[0] == 0
    (tmp_path / "ready").unlink()
    assert _signalled(tmp_path, script, signal.SIGTERM, **queue, JOB_NUM_TRIALS="2")[0] == 75


# A child as `job trial` is one, up to the place where it stands still. `PyDLL` keeps the
# interpreter's lock, so that no thread of the child runs any more.
CHILD = """import ctypes, faulthandler, os, signal, sys, threading, time
from job.process.heartbeat import beat, open_beat
from job.process.stop import Stop
faulthandler.enable()
stop = Stop(float(os.environ.get("JOB_GRACE_SECONDS", 15)))
signal.signal(signal.SIGTERM, stop.set)
ends = open_beat(int(sys.argv[-1]))
def beating():
    while True:
        beat(ends)
        time.sleep(0.05)
threading.Thread(target=beating, daemon=True).start()
time.sleep(0.2)
open(os.environ["OUT"] + "/ready", "w").close()
def the_place_where_it_hangs():
    {hang}
the_place_where_it_hangs()
"""


def test_a_trial_that_runs_no_python_any_more_says_where_and_ends_in_74(tmp_path: Path) -> None:
    script = CHILD.format(hang="ctypes.PyDLL(None).sleep(60)")
    code, _, err = _run("run", script, tmp_path)
    assert code == ExitCode.OUTAGE, err
    assert "the_place_where_it_hangs" in err
    assert "hang: the trial ran no Python any more and was killed" in err


@pytest.mark.slow
def test_a_frozen_trial_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    script = CHILD.format(hang="os.kill(os.getpid(), signal.SIGSTOP)")
    os.mkfifo(tmp_path / "ready")
    parent = _start("run", script, tmp_path)
    _await_ready(tmp_path)
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    time.sleep(1.0)  # the limit is 0.4 s; nothing can be awaited of a frozen process
    os.kill(int(child), signal.SIGCONT)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("library", ["CDLL", "PyDLL"], ids=["a blocking C call", "holds the lock"])
def test_sigterm_ends_in_75_within_the_grace_whatever_the_trial_is_in(
    tmp_path: Path, library: str
) -> None:
    # A signal cuts sleep(3) short: it is called again and again.
    script = CHILD.format(hang=f"[ctypes.{library}(None).sleep(60) for _ in range(60)]")
    started = time.monotonic()
    code, err = _signalled(
        tmp_path, script, signal.SIGTERM, verb="run patiently", JOB_GRACE_SECONDS="5"
    )
    assert code == ExitCode.PREEMPTED, err
    assert time.monotonic() - started < 5 + 1, "a second for the start of two interpreters"
